#include "support/tolerance.h"

#include <cmath>
#include <limits>
#include <stdexcept>

namespace anabranch::test {
namespace {

// Spacing of the smallest numbers of a type: results below it are lost however exact the relative
// error is.
double smallest(torch::Dtype dtype) {
  switch (dtype) {
    case torch::kFloat16:
      return 5.9604644775390625e-8;
    case torch::kBFloat16:
      return 9.183549615799121e-41;
    case torch::kFloat32:
      return std::numeric_limits<float>::denorm_min();
    default:
      return std::numeric_limits<double>::denorm_min();
  }
}

}  // namespace

double unit_roundoff(torch::Dtype dtype) {
  switch (dtype) {
    case torch::kFloat16:
      return 0x1p-11;
    case torch::kBFloat16:
      return 0x1p-8;
    case torch::kFloat32:
      return 0x1p-24;
    case torch::kFloat64:
      return 0x1p-53;
    default:
      throw std::invalid_argument("no roundoff for " + to_string(dtype));
  }
}

torch::Dtype accumulation_type(torch::Dtype dtype) {
  return dtype == torch::kFloat64 ? torch::kFloat64 : torch::kFloat32;
}

torch::Tensor tolerance(torch::Dtype dtype, int64_t reduction_length,
                        const torch::Tensor& magnitude, int64_t roundings) {
  const double relative =
      static_cast<double>(reduction_length) * unit_roundoff(accumulation_type(dtype)) +
      static_cast<double>(roundings) * unit_roundoff(dtype);
  return magnitude.to(torch::kCPU, torch::kFloat64) * relative +
         static_cast<double>(roundings) * smallest(dtype);
}

double tolerance(torch::Dtype dtype, int64_t reduction_length, double magnitude,
                 int64_t roundings) {
  return tolerance(dtype, reduction_length, torch::tensor(magnitude, torch::kFloat64), roundings)
      .item<double>();
}

double tolerance_of_stages(torch::Dtype dtype, int64_t reduction_length, double root_sum_square,
                           int64_t roundings) {
  const double relative =
      static_cast<double>(reduction_length) * unit_roundoff(accumulation_type(dtype)) +
      6 * std::sqrt(static_cast<double>(roundings)) * unit_roundoff(dtype);
  return root_sum_square * relative + static_cast<double>(roundings) * smallest(dtype);
}

::testing::AssertionResult close(const torch::Tensor& actual, const torch::Tensor& expected,
                                 const torch::Tensor& allowed) {
  if (!actual.defined() || !expected.defined()) {
    return ::testing::AssertionFailure() << "undefined tensor";
  }
  if (actual.sizes() != expected.sizes()) {
    return ::testing::AssertionFailure()
           << "shape " << actual.sizes() << " instead of " << expected.sizes();
  }
  if (actual.numel() == 0) {
    return ::testing::AssertionSuccess();
  }
  const auto a = actual.detach().to(torch::kCPU, torch::kFloat64).reshape({-1});
  const auto b = expected.detach().to(torch::kCPU, torch::kFloat64).reshape({-1});
  const auto limit = allowed.to(torch::kFloat64).expand(actual.sizes()).reshape({-1});
  // How much of what is allowed is used; NaN counts as infinitely much.
  const auto used = ((a - b).abs() / limit).nan_to_num(0, 0, 0) +
                    ((a - b).abs() <= limit).logical_not().to(torch::kFloat64) * 1e300;
  const auto worst = used.argmax().item<int64_t>();
  if (used[worst].item<double>() < 1e300) {
    return ::testing::AssertionSuccess();
  }
  const auto wrong = used.ge(1e300).sum().item<int64_t>();
  return ::testing::AssertionFailure()
         << wrong << " of " << a.numel() << " elements of " << actual.sizes()
         << " too far off; at flat index " << worst << ": " << a[worst].item<double>()
         << " instead of " << b[worst].item<double>() << ", off by "
         << std::abs(a[worst].item<double>() - b[worst].item<double>()) << ", allowed "
         << limit[worst].item<double>();
}

::testing::AssertionResult close(const torch::Tensor& actual, const torch::Tensor& expected,
                                 double allowed) {
  return close(actual, expected, torch::tensor(allowed, torch::kFloat64));
}

::testing::AssertionResult identical(const torch::Tensor& actual, const torch::Tensor& expected) {
  if (actual.defined() != expected.defined()) {
    return ::testing::AssertionFailure()
           << (actual.defined() ? "defined" : "undefined") << " unlike the other";
  }
  if (!actual.defined()) {
    return ::testing::AssertionSuccess();
  }
  if (actual.scalar_type() != expected.scalar_type() || actual.sizes() != expected.sizes()) {
    return ::testing::AssertionFailure()
           << to_string(actual.scalar_type()) << actual.sizes() << " instead of "
           << to_string(expected.scalar_type()) << expected.sizes();
  }
  const auto bytes = [](const torch::Tensor& tensor) {
    return tensor.detach().cpu().contiguous().reshape({-1}).view(torch::kUInt8);
  };
  if (actual.numel() == 0 || bytes(actual).equal(bytes(expected))) {
    return ::testing::AssertionSuccess();
  }
  const auto difference =
      actual.detach().cpu().to(torch::kFloat64) - expected.detach().cpu().to(torch::kFloat64);
  return ::testing::AssertionFailure()
         << difference.ne(0).sum().item<int64_t>() << " of " << actual.numel()
         << " elements differ, by at most " << max_abs(difference);
}

double max_abs(const torch::Tensor& tensor) {
  return tensor.numel() == 0 ? 0.0 : tensor.detach().abs().max().item<double>();
}

std::string to_string(torch::Dtype dtype) { return c10::toString(dtype); }

}  // namespace anabranch::test
