#include <ATen/ATen.h>
#include <anabranch/gradients.h>

#include <algorithm>
#include <cmath>

#include "exchange/late_refusals.h"
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

/// The parameter's gradient, zeros made for one that is undefined.
torch::Tensor gradient_of(const ParallelParameter& parameter) {
  if (parameter.main_grad.defined()) return parameter.main_grad;
  auto& gradient = parameter.tensor.mutable_grad();
  if (!gradient.defined()) gradient = at::zeros_like(parameter.tensor);
  check_input(gradient.layout() == at::kStrided, "the gradient of ", parameter.name,
              " must be dense, got layout ", gradient.layout());
  return gradient;
}

/// Σ x² in fp64, in pieces, so that the fp64 copy stays small.
torch::Tensor sum_of_squares(const torch::Tensor& x) {
  constexpr int64_t kPiece = int64_t{1} << 22;
  const auto flat = x.reshape({-1});
  auto sum = at::zeros({}, x.options().dtype(at::kDouble));
  for (int64_t start = 0; start < flat.numel(); start += kPiece) {
    const auto length = std::min(kPiece, flat.numel() - start);
    sum.add_(flat.narrow(0, start, length).to(at::kDouble).square().sum());
  }
  return sum;
}

}  // namespace

void average_gradients(const std::vector<torch::Tensor>& gradients, Communicator& communicator,
                       int64_t divisor, int64_t bucket_bytes) {
  check_input(bucket_bytes > 0, "bucket_bytes must be positive, got ", bucket_bytes);
  const at::NoGradGuard no_grad;
  if (communicator.size() == 1) {
    if (divisor == 1) return;
    for (const auto& gradient : gradients) gradient.div_(divisor);
    return;
  }
  for (const auto& bucket : make_buckets(gradients, bucket_bytes)) {
    if (bucket.elements > 0) average(bucket, communicator, divisor);
  }
}

double gradient_norm(const std::vector<torch::Tensor>& experts,
                     const std::vector<torch::Tensor>& replicated, Communicator& world,
                     int64_t expert_parallel_size) {
  const at::NoGradGuard no_grad;
  const auto& first = experts.empty() ? replicated : experts;
  const auto device = first.empty() ? at::kCPU : first.front().device();
  // [2]: this rank's experts, the replicated parameters.
  auto squares = at::zeros({2}, at::TensorOptions(at::kDouble).device(device));
  for (const auto& gradient : experts) squares[0].add_(sum_of_squares(gradient).to(device));
  for (const auto& gradient : replicated) squares[1].add_(sum_of_squares(gradient).to(device));
  // One group of expert-parallel ranks holds every expert once; replicated ones are rank 0's.
  const auto gathered = world.all_gather(squares).cpu();
  world.check();
  const auto* values = gathered.const_data_ptr<double>();
  double sum = values[1];
  for (int64_t rank = 0; rank < expert_parallel_size; ++rank) sum += values[2 * rank];
  return std::sqrt(sum);
}

void finish_gradients(torch::nn::Module& model, const ParallelGroups& groups,
                      int64_t bucket_bytes) {
  check_late_refusals();
  const at::NoGradGuard no_grad;
  std::vector<torch::Tensor> replicated;
  std::vector<torch::Tensor> experts;
  for (const auto& parameter : parallel_parameters(model, groups)) {
    if (!parameter.tensor.requires_grad()) continue;
    (parameter.is_expert ? experts : replicated).push_back(gradient_of(parameter));
  }
  const int64_t ranks = groups.world->size();
  average_gradients(replicated, *groups.world, ranks, bucket_bytes);
  average_gradients(experts, *groups.expert_replicas, ranks, bucket_bytes);
}

double gradient_norm(const torch::nn::Module& model, const ParallelGroups& groups) {
  std::vector<torch::Tensor> replicated;
  std::vector<torch::Tensor> experts;
  for (const auto& parameter : parallel_parameters(model, groups)) {
    const auto& gradient = parameter.gradient();
    if (!gradient.defined() || !parameter.tensor.requires_grad()) continue;
    (parameter.is_expert ? experts : replicated).push_back(gradient);
  }
  return gradient_norm(experts, replicated, *groups.world, groups.expert_parallel->size());
}

double clip_gradient_norm(torch::nn::Module& model, double max_norm, const ParallelGroups& groups) {
  check_input(max_norm > 0, "max_norm must be positive, got ", max_norm);
  const double norm = gradient_norm(model, groups);
  check_input(std::isfinite(norm), "the gradient's norm is ", norm);
  if (norm <= max_norm) return norm;
  const at::NoGradGuard no_grad;
  for (const auto& parameter : parallel_parameters(model)) {
    const auto& gradient = parameter.gradient();
    if (gradient.defined() && parameter.tensor.requires_grad()) gradient.mul_(max_norm / norm);
  }
  return norm;
}

}  // namespace anabranch
