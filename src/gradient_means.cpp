#include "gradient_means.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <iterator>
#include <limits>

#include "support/check.h"

namespace anabranch {
namespace {

at::ScalarType travelling_type(const torch::Tensor& gradient) {
  return at::isReducedFloatingType(gradient.scalar_type()) ? at::kFloat : gradient.scalar_type();
}

bool travel_together(const torch::Tensor& one, const torch::Tensor& other) {
  return travelling_type(one) == travelling_type(other) && one.device() == other.device();
}

}  // namespace

std::vector<Bucket> make_buckets(const std::vector<torch::Tensor>& gradients,
                                 int64_t bucket_bytes) {
  std::vector<Bucket> buckets;
  std::vector<int64_t> bytes;
  for (size_t place = gradients.size(); place-- > 0;) {
    const auto& gradient = gradients[place];
    size_t fits = 0;
    while (fits < buckets.size() &&
           (bytes[fits] >= bucket_bytes ||
            !travel_together(gradients[buckets[fits].front()], gradient))) {
      ++fits;
    }
    if (fits == buckets.size()) {
      buckets.emplace_back();
      bytes.push_back(0);
    }
    buckets[fits].push_back(place);
    bytes[fits] +=
        gradient.numel() * static_cast<int64_t>(c10::elementSize(travelling_type(gradient)));
  }
  return buckets;
}

MeanMessage::MeanMessage(std::vector<torch::Tensor> gradients) : gradients_(std::move(gradients)) {
  int64_t elements = 0;
  for (const auto& gradient : gradients_) elements += gradient.numel();
  const auto& first = gradients_.front();
  message_ = at::empty({elements}, first.options().dtype(travelling_type(first)));
  int64_t offset = 0;
  for (const auto& gradient : gradients_) {
    parts_.push_back(message_.narrow(0, offset, gradient.numel()).view(gradient.sizes()));
    parts_.back().copy_(gradient);
    offset += gradient.numel();
  }
}

void MeanMessage::average(Communicator& communicator, int64_t divisor) {
  if (message_.numel() == 0) return;
  communicator.all_reduce(message_);
  message_.div_(divisor);
}

void MeanMessage::bring_back() const {
  for (size_t i = 0; i < parts_.size(); ++i) gradients_[i].copy_(parts_[i]);
}

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

void tell(const torch::Tensor& not_finite, const std::vector<torch::Tensor>& experts,
          const std::vector<torch::Tensor>& replicated) {
  std::vector<torch::Tensor> numbers;
  const auto add_first_of = [&](const torch::Tensor& gradient) {
    if (gradient.numel() > 0) {
      numbers.push_back(gradient.as_strided({}, {}, gradient.storage_offset()));
    }
  };
  for (const auto& gradient : experts) add_first_of(gradient);
  if (!replicated.empty()) add_first_of(replicated.front());
  if (!numbers.empty()) at::_foreach_add_(numbers, not_finite[0]);
}

torch::Tensor gradient_of(const ParallelParameter& parameter) {
  if (parameter.main_grad.defined()) return parameter.main_grad;
  auto& gradient = parameter.tensor.mutable_grad();
  if (!gradient.defined()) gradient = at::zeros_like(parameter.tensor);
  check_input(gradient.layout() == at::kStrided, "the gradient of ", parameter.name,
              " must be dense, got layout ", gradient.layout());
  return gradient;
}

}  // namespace anabranch
