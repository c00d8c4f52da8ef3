#pragma once

#include <anabranch/gradients.h>

#include <memory>
#include <vector>

namespace anabranch {

/// finish_gradients, of which the sums run beside the backward that makes the gradients: each message goes
/// as soon as its gradients are there, by a thread of its own or, where its calls launch kernels, by backward's on a
/// stream of its own. Once for a model, then in every step:
///
///     loss.backward();   // of all micro-batches but the last
///     reducer.start();
///     loss.backward();   // of the last one
///     reducer.finish();  // in the place of finish_gradients
///
/// Gradients become, bit for bit, those of finish_gradients with the same `bucket_bytes`. All ranks send
/// messages in one order, from the last registered parameters to the first; one whose parameter this rank's
/// backward does not reach, and those behind it, go in `finish`. So do all over process groups whose backend for
/// GPUs is NCCL, which has one order of calls (Communicator::split_order).
class GradientReducer {
 public:
  /// Of the parameters that require gradients now. Collective over the world, of which it makes groups of its
  /// own: its messages are under way at the same time as the layers'.
  GradientReducer(const torch::nn::Module& model, const ParallelGroups& groups,
                  int64_t bucket_bytes = kBucketBytes);
  /// For parameters that no torch::nn::Module holds, all in the same order on all ranks.
  GradientReducer(std::vector<ParallelParameter> parameters, Communicator& world,
                  Communicator& expert_replicas, int64_t bucket_bytes = kBucketBytes);
  /// Waits, until the deadline, for what is under way, as after a step that has thrown.
  ~GradientReducer();
  GradientReducer(const GradientReducer&) = delete;
  GradientReducer& operator=(const GradientReducer&) = delete;

  /// What the next backward brings is final. Throws InputError where finish_gradients would, for gradients
  /// that are finished already, and twice without `finish`. On every rank.
  void start();

  /// Returns what finish_gradients does of Gradients; `beside` as there. Collective. Throws InputError without
  /// `start`, and for a gradient that has changed since it was taken, by a second backward, a loss
  /// scaler's unscaling, or zero_grad: gradients are then what they were, and what has been summed is lost.
  torch::Tensor finish(const std::vector<torch::Tensor>& beside = {});

  /// Messages that have been summed since `start`; on a GPU, those that have been launched.
  int64_t summed() const;

 private:
  class Step;
  std::unique_ptr<Step> step_;
};

}  // namespace anabranch
