#pragma once

#include <cmath>
#include <string>
#include <utility>

#include "support/layer_case.h"
#include "support/tolerance.h"

namespace anabranch::test {

/// What one step may err by, from the sizes of a case; see tolerance.h. Longest chain: gate (h), up
/// (h), down (n), the token's experts, and back; weight gradients also sum over the tokens. Rounded on
/// the way: hidden, with bias, activation, expert's result, with bias, partial sums, their sum, the
/// shared expert's share; backward rounds the gradients at the result, the activation, the hidden
/// values, the rows and their sums as well.
class StepLimits {
 public:
  StepLimits(const LayerCase& layer_case, Scale scale, int ranks)
      : case_(layer_case), scale_(std::move(scale)) {
    const auto& options = case_.options;
    length_ = 4 * (2 * options.hidden_size + 2 * options.expert_hidden_size +
                   options.shared_expert_hidden_size + options.num_experts + ranks) +
              32;
  }

  double output(const torch::Tensor& expected) const {
    return tolerance_of_stages(case_.options.dtype, length_, scale_.output + max_abs(expected), 8);
  }
  double dx(const torch::Tensor& expected) const {
    return backward(scale_.dx + max_abs(expected) +
                    max_abs(case_.parameters.at("router.weight")) * dlogits(1));
  }
  double dweights(const torch::Tensor& expected) const {
    return backward(scale_.dweights + max_abs(expected));
  }
  double gradient(const std::string& name, const torch::Tensor& expected) const {
    // What reaches the gate is a difference: its terms are larger than the result.
    const double terms = name == "router.weight"
                             ? dlogits(case_.tokens) * (1 + max_abs(case_.x.to(torch::kFloat64)))
                             : 0.0;
    return backward(scale_.gradients.at(name) + max_abs(expected) + terms);
  }
  double loss(const torch::Tensor& expected) const {
    return tolerance(accumulation_type(case_.options.dtype), length_ + case_.tokens,
                     1 + max_abs(expected));
  }

 private:
  double backward(double root_sum_square) const {
    return tolerance_of_stages(case_.options.dtype, 2 * length_ + case_.tokens, root_sum_square,
                               16);
  }
  // Independent errors of that many tokens' logits add up as their root. Auxiliary losses add terms
  // of the order of 1.
  double dlogits(int64_t tokens) const {
    return (2 * scale_.dweights * case_.options.routing_scale + 1) *
           std::sqrt(static_cast<double>(tokens));
  }

  const LayerCase& case_;
  Scale scale_;  // its own: callers hand in what they have just computed
  int64_t length_;
};

}  // namespace anabranch::test
