#pragma once

#include <anabranch/parameters.h>

#include <optional>

namespace anabranch {

/// The least size of a message of gradients, where there are as many.
inline constexpr int64_t kBucketBytes = 16 << 20;

/// Makes every gradient that of the mean of the ranks' losses: once a step, after its last backward and
/// before the optimizer. Replicated parameters: averaged over the world. Expert parameters: they already
/// hold every token of their expert-parallel group, so they are summed over their replicas and divided by
/// the world's size. A gradient that is undefined on this rank counts as zero and is defined
/// afterwards; a parameter that requires none is left alone. Experts' main_grad is meant where it is
/// defined, also below. Collective over the world, in a few
/// coalesced messages of about `bucket_bytes`; 16-bit types travel in fp32 and are rounded once.
///
/// Where a rank's gradient holds a number that is not finite, gradients of every rank do afterwards: ranks
/// that skip such a step, as loss scaling has it, all skip it.
///
/// Throws InputError, before any communication, for experts' gradients that it has finished before: where
/// nothing has changed them since, or one more backward has added to them.
void finish_gradients(torch::nn::Module& model, const ParallelGroups& groups,
                      int64_t bucket_bytes = kBucketBytes);

/// L2 norm of the whole model's finished gradient, each expert counted once. The same value on
/// every rank, summed in fp64. Collective. Throws InputError on every rank for gradients that are not
/// finished: replicas of one parameter differ.
double gradient_norm(const torch::nn::Module& model, const ParallelGroups& groups);

/// Whether all numbers in the finished gradients of all ranks are finite: what a loss scaler asks before
/// the optimizer's step. The same answer on every rank. Collective.
bool gradients_are_finite(const torch::nn::Module& model, const ParallelGroups& groups);

/// Scales the gradients so that their norm is at most `max_norm`; returns the norm before.
/// Collective. Throws InputError if the norm is not finite or `max_norm` is not positive.
/// `loss_scale`: of a loss scaler, which the gradients are still multiplied by. The norms are those
/// without it; one that is not finite is returned and the gradients are left alone.
double clip_gradient_norm(torch::nn::Module& model, double max_norm, const ParallelGroups& groups,
                          std::optional<double> loss_scale = std::nullopt);

// The same for gradients that no torch::nn::Module holds.

/// Of this rank: those of replicated parameters in the same order on all ranks.
struct Gradients {
  std::vector<torch::Tensor> experts;
  std::vector<torch::Tensor> replicated;
  /// Few numbers to be averaged over the world as well, in the last message.
  std::vector<torch::Tensor> beside = {};
};

/// Returns [1]: 0, or NaN if an expert's gradient on some rank was not finite; it has been added to a
/// number of each expert's, and of the first replicated one. Collective over both.
torch::Tensor finish_gradients(const Gradients& gradients, Communicator& world,
                               Communicator& expert_replicas, int64_t bucket_bytes = kBucketBytes);

/// Whether finish_gradients has finished it, whatever has changed it since.
bool is_finished(const torch::Tensor& gradient);

/// The experts are spread over `expert_parallel_size` consecutive ranks of the world. Collective.
double gradient_norm(const Gradients& gradients, Communicator& world, int64_t expert_parallel_size);

/// What clipping multiplies gradients by, on their device.
struct GradientScale {
  torch::Tensor norm;   ///< [] fp64: L2 norm of the whole model's finished gradient
  torch::Tensor scale;  ///< [] fp64: at most 1; NaN where the norm is not finite
};
/// The same norm and, for a norm of at most `max_norm` (0: any), its factor; nothing is scaled, and the host
/// does not wait for a GPU. Whether the gradients are finished is not checked. Collective.
GradientScale gradient_scale(const Gradients& gradients, double max_norm, Communicator& world,
                             int64_t expert_parallel_size);

/// Returns a norm that is not finite, and then leaves the gradients alone. Collective.
double clip_gradient_norm(const Gradients& gradients, double max_norm, Communicator& world,
                          int64_t expert_parallel_size, double loss_scale = 1);

}  // namespace anabranch
