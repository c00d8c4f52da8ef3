#include <ATen/ATen.h>
#include <anabranch/gradients.h>

#include <algorithm>
#include <iterator>
#include <limits>

#include "exchange/late_refusals.h"
#include "finished_gradients.h"
#include "support/check.h"

namespace anabranch {
namespace {

/// Gradients of one type and device that travel in one message.
struct Bucket {
  std::vector<torch::Tensor> gradients;
  int64_t elements = 0;

  int64_t bytes() const { return elements * gradients.front().element_size(); }
  bool has_kind_of(const torch::Tensor& gradient) const {
    return gradients.front().scalar_type() == gradient.scalar_type() &&
           gradients.front().device() == gradient.device();
  }
};

/// Depends only on sizes, types and order, so that ranks with the same parameters make the same
/// buckets.
std::vector<Bucket> make_buckets(const std::vector<torch::Tensor>& gradients,
                                 int64_t bucket_bytes) {
  std::vector<Bucket> buckets;
  for (const auto& gradient : gradients) {
    auto bucket = std::find_if(buckets.begin(), buckets.end(), [&](const Bucket& candidate) {
      return candidate.has_kind_of(gradient) && candidate.bytes() < bucket_bytes;
    });
    if (bucket == buckets.end()) bucket = buckets.emplace(bucket);
    bucket->gradients.push_back(gradient);
    bucket->elements += gradient.numel();
  }
  return buckets;
}

/// Replaces the bucket's gradients with their sum over `communicator` divided by `divisor`. 16-bit
/// types travel in fp32: a sum may overflow where the mean does not, and rounding happens once.
void average(const Bucket& bucket, Communicator& communicator, int64_t divisor) {
  const auto& first = bucket.gradients.front();
  const auto type =
      at::isReducedFloatingType(first.scalar_type()) ? at::kFloat : first.scalar_type();
  auto message = at::empty({bucket.elements}, first.options().dtype(type));
  std::vector<torch::Tensor> parts;
  int64_t offset = 0;
  for (const auto& gradient : bucket.gradients) {
    parts.push_back(message.narrow(0, offset, gradient.numel()).view(gradient.sizes()));
    parts.back().copy_(gradient);
    offset += gradient.numel();
  }
  communicator.all_reduce(message);
  message.div_(divisor);
  for (size_t i = 0; i < parts.size(); ++i) bucket.gradients[i].copy_(parts[i]);
}

/// Replaces each with its sum over the ranks of `communicator` divided by `divisor`. Collective.
void average(const std::vector<torch::Tensor>& gradients, Communicator& communicator,
             int64_t divisor, int64_t bucket_bytes) {
  if (communicator.size() == 1) {
    if (divisor == 1) return;
    for (const auto& gradient : gradients) gradient.div_(divisor);
    return;
  }
  for (const auto& bucket : make_buckets(gradients, bucket_bytes)) {
    if (bucket.elements > 0) average(bucket, communicator, divisor);
  }
}

/// [1] 0, or NaN if a number in `gradients` is not finite; of a type and on a device that travel with
/// `beside`. The host does not wait for the device.
torch::Tensor nan_unless_finite(const std::vector<torch::Tensor>& gradients,
                                const std::vector<torch::Tensor>& beside) {
  const auto& first = beside.empty() ? gradients : beside;
  auto options = at::TensorOptions(at::kFloat);
  if (!first.empty()) {
    const bool wide = first.front().scalar_type() == at::kDouble;
    options = first.front().options().dtype(wide ? at::kDouble : at::kFloat);
  }
  std::vector<torch::Tensor> filled;
  std::copy_if(gradients.begin(), gradients.end(), std::back_inserter(filled),
               [](const auto& gradient) { return gradient.numel() > 0; });
  if (filled.empty()) return at::zeros({1}, options);
  auto largest = at::_foreach_norm(filled, std::numeric_limits<double>::infinity());
  for (auto& value : largest) value = value.to(options);
  return at::stack(largest).mul_(0).sum(0, /*keepdim=*/true);
}

/// Adds `value` [1] to one number of each.
void add_to_first_numbers(const std::vector<torch::Tensor>& gradients, const torch::Tensor& value) {
  std::vector<torch::Tensor> numbers;
  for (const auto& gradient : gradients) {
    if (gradient.numel() == 0) continue;
    numbers.push_back(gradient.as_strided({}, {}, gradient.storage_offset()));
  }
  if (!numbers.empty()) at::_foreach_add_(numbers, value[0]);
}

/// The parameter's gradient, zeros made for one that is undefined.
torch::Tensor gradient_of(const ParallelParameter& parameter) {
  if (parameter.main_grad.defined()) return parameter.main_grad;
  auto& gradient = parameter.tensor.mutable_grad();
  if (!gradient.defined()) gradient = at::zeros_like(parameter.tensor);
  check_input(gradient.layout() == at::kStrided, "the gradient of ", parameter.name,
              " must be dense, got layout ", gradient.layout());
  return gradient;
}

}  // namespace

torch::Tensor finish_gradients(const Gradients& gradients, Communicator& world,
                               Communicator& expert_replicas, int64_t bucket_bytes) {
  check_input(bucket_bytes > 0, "bucket_bytes must be positive, got ", bucket_bytes);
  check_late_refusals();
  const at::NoGradGuard no_grad;
  const bool none = gradients.experts.empty() && gradients.replicated.empty();
  if (world.size() == 1 || none) return nan_unless_finite({}, gradients.replicated);
  check_unfinished(gradients.experts);
  // The sums of replicated gradients are not finite anywhere if they are not on one rank; those of
  // experts are on their own ranks alone.
  auto replicated = gradients.replicated;
  const auto not_finite = nan_unless_finite(gradients.experts, replicated);
  replicated.push_back(not_finite);
  average(replicated, world, world.size(), bucket_bytes);
  average(gradients.experts, expert_replicas, world.size(), bucket_bytes);
  // A rank may have no experts: it hears of it by the first of the replicated gradients.
  auto told = gradients.experts;
  told.push_back(replicated.front());
  add_to_first_numbers(told, not_finite);
  mark_finished(gradients.experts);
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
