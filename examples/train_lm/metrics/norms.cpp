#include "metrics/norms.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <cmath>

namespace train_lm {
namespace {

constexpr std::array kParts = {"embedding", "attention", "experts", "router",
                               "norms",     "head",      "other"};

size_t part_of(const anabranch::ParallelParameter& parameter) {
  const auto named = [&](const char* word) {
    return parameter.name.find(word) != std::string::npos;
  };
  const char* part = parameter.is_expert || named("expert") ? "experts"
                     : named("router")                      ? "router"
                     : named("norm")                        ? "norms"
                     : named("attention")                   ? "attention"
                     : named("embedding")                   ? "embedding"
                     : named("head")                        ? "head"
                                                            : "other";
  return static_cast<size_t>(std::find(kParts.begin(), kParts.end(), part) - kParts.begin());
}

}  // namespace

std::vector<std::pair<std::string, double>> gradient_norms(
    const std::vector<anabranch::ParallelParameter>& parameters,
    const anabranch::ParallelGroups& groups) {
  const torch::NoGradGuard no_grad;
  std::array<bool, kParts.size()> there = {};
  // Experts' squares are added up over the ranks that share one set; replicated ones' are everywhere.
  std::array<std::array<torch::Tensor, kParts.size()>, 2> squares;
  for (const auto& parameter : parameters) {
    const size_t part = part_of(parameter);
    there[part] = true;
    if (const auto& gradient = parameter.gradient(); gradient.defined()) {
      auto& sum = squares[parameter.is_expert ? 1 : 0][part];
      const auto dtype = gradient.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
      const auto norm = at::linalg_vector_norm(gradient, 2, {}, /*keepdim=*/false, dtype);
      const auto square = norm.to(at::kDouble).square();
      sum = sum.defined() ? sum + square : square;
    }
  }
  const auto gathered = [&](const auto& sums) {
    torch::Tensor all = at::zeros({static_cast<int64_t>(kParts.size())}, at::kDouble);
    for (size_t part = 0; part < kParts.size(); ++part) {
      if (sums[part].defined()) {
        all[static_cast<int64_t>(part)] = sums[part].cpu();
      }
    }
    return all;
  };
  torch::Tensor experts = gathered(squares[1]);
  groups.expert_parallel->all_reduce(experts);
  const torch::Tensor norms = (experts + gathered(squares[0])).sqrt();
  std::vector<std::pair<std::string, double>> result;
  for (size_t part = 0; part < kParts.size(); ++part) {
    if (there[part]) {
      result.emplace_back(kParts[part], norms.const_data_ptr<double>()[part]);
    }
  }
  return result;
}

}  // namespace train_lm
