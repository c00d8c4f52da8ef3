#include <ATen/ATen.h>
#include <anabranch/gradients.h>

#include "exchange/late_refusals.h"
#include "finished_gradients.h"
#include "gradient_means.h"
#include "support/check.h"

namespace anabranch {
namespace {

std::vector<torch::Tensor> of_bucket(const Bucket& bucket,
                                     const std::vector<torch::Tensor>& gradients) {
  std::vector<torch::Tensor> members;
  for (const size_t place : bucket) members.push_back(gradients[place]);
  return members;
}

void average(std::vector<torch::Tensor> gradients, Communicator& communicator, int64_t divisor) {
  MeanMessage message(std::move(gradients));
  message.average(communicator, divisor);
  message.bring_back();
}

}  // namespace

torch::Tensor finish_gradients(const Gradients& gradients, Communicator& world,
                               Communicator& expert_replicas, int64_t bucket_bytes) {
  check_input(bucket_bytes > 0, "bucket_bytes must be positive, got ", bucket_bytes);
  check_late_refusals();
  const at::NoGradGuard no_grad;
  const auto& [experts, replicated, beside] = gradients;
  const bool none = experts.empty() && replicated.empty() && beside.empty();
  if (world.size() == 1 || none) return nan_unless_finite({}, replicated);
  check_unfinished(experts);
  // The sums of replicated gradients are not finite anywhere if they are not on one rank; those of
  // experts are on their own ranks alone.
  const auto not_finite = nan_unless_finite(experts, replicated);

  auto buckets = make_buckets(replicated, bucket_bytes);
  if (buckets.empty()) buckets.emplace_back();
  for (const auto& bucket : buckets) {
    auto members = of_bucket(bucket, replicated);
    if (&bucket == &buckets.back()) {
      members.insert(members.end(), beside.begin(), beside.end());
      members.push_back(not_finite);
    }
    average(std::move(members), world, world.size());
  }
  if (expert_replicas.size() == 1) {
    for (const auto& gradient : experts) gradient.div_(world.size());
  } else {
    for (const auto& bucket : make_buckets(experts, bucket_bytes)) {
      average(of_bucket(bucket, experts), expert_replicas, world.size());
    }
  }
  tell(not_finite, experts, replicated);
  mark_finished(experts);
  return not_finite;
}

void finish_gradients(torch::nn::Module& model, const ParallelGroups& groups,
                      int64_t bucket_bytes) {
  const at::NoGradGuard no_grad;
  Gradients gradients;
  for (const auto& parameter : parallel_parameters(model, groups)) {
    if (!parameter.tensor.requires_grad()) continue;
    (parameter.is_expert ? gradients.experts : gradients.replicated)
        .push_back(gradient_of(parameter));
  }
  finish_gradients(gradients, *groups.world, *groups.expert_replicas, bucket_bytes);
}

}  // namespace anabranch
