#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "optimizers/optimizer_case.h"
#include "support/tolerance.h"

namespace anabranch::test {
namespace {

bool is_matrix(const ParallelParameter& parameter) { return parameter.name.ends_with("_weight"); }

/// Up-projections of many experts have gate and up part, see ShardedModel.
int64_t parts_of(const ParallelParameter& parameter) {
  return parameter.name == "experts.up_weight" ? 2 : 1;
}

std::unique_ptr<ParallelOptimizer> muon_of(const std::vector<ParallelParameter>& parameters,
                                           const MuonOptions& options) {
  std::vector<MuonParameter> matrices;
  std::vector<ParallelParameter> others;
  for (const auto& parameter : parameters) {
    if (is_matrix(parameter)) {
      matrices.push_back({parameter, parts_of(parameter)});
    } else {
      others.push_back(parameter);
    }
  }
  return make_muon(matrices, others, options);
}

/// One matrix at a time, as the algorithm is written: a·X + b·(XXᵀ)X + c·(XXᵀ)²X, with as many rows as columns
/// or fewer.
torch::Tensor plain_iterations(torch::Tensor x, int64_t iterations) {
  const bool tall = x.size(0) > x.size(1);
  if (tall) x = x.t();
  x = x / (x.square().sum().sqrt() + 1e-7);
  for (int64_t i = 0; i < iterations; ++i) {
    const auto gram = torch::mm(x, x.t());
    x = 3.4445 * x - 4.7750 * torch::mm(gram, x) + 2.0315 * torch::mm(torch::mm(gram, gram), x);
  }
  return tall ? x.t() : x;
}

/// A whole parameter [experts, parts · m, n] after all steps, matrix by matrix, in fp64.
torch::Tensor plain_muon(const torch::Tensor& start, const std::vector<torch::Tensor>& gradients,
                         int64_t parts, const MuonOptions& options) {
  auto result = start.to(torch::kCPU, torch::kFloat64).clone();
  const int64_t rows = result.size(1) / parts;
  for (int64_t expert = 0; expert < result.size(0); ++expert) {
    for (int64_t part = 0; part < parts; ++part) {
      auto matrix = result[expert].narrow(0, part * rows, rows);
      auto momentum = torch::zeros_like(matrix);
      for (const auto& all : gradients) {
        const auto g = all.to(torch::kCPU, torch::kFloat64)[expert].narrow(0, part * rows, rows);
        momentum = options.momentum * momentum + g;
        const auto direction = g + options.momentum * momentum;
        const double size = static_cast<double>(std::max(rows, matrix.size(1)));
        const auto step = 0.2 * std::sqrt(size) * plain_iterations(direction, options.iterations);
        matrix.copy_(matrix - kRate * (step + options.weight_decay * matrix));
      }
    }
  }
  return result;
}

TEST(Muon, IsThatOfEachMatrixAtEveryLayout) {
  const ShardedModel::Options options{.num_experts = 5, .dtype = torch::kFloat64};
  const MuonOptions muon;
  const auto whole = make_whole_model(options, test_seed());
  std::map<std::string, torch::Tensor> start;
  std::map<std::string, std::vector<torch::Tensor>> gradients;
  for (const auto& item : whole->named_parameters()) start[item.key()] = item.value().detach();
  for (int64_t step = 1; step <= kSteps; ++step) {
    whole->set_gradients(test_seed() + static_cast<uint64_t>(step));
    for (const auto& item : whole->named_parameters()) {
      if (item.value().grad().defined()) gradients[item.key()].push_back(item.value().grad());
    }
  }
  for (const int size : expert_parallel_sizes()) {
    const auto& groups = parallel_groups(size);
    OptimizerCase of(options, *groups.expert_parallel, groups);
    const auto optimizer = muon_of(of.parameters, muon);
    for (int64_t step = 1; step <= kSteps; ++step) {
      of.set_gradients(step);
      optimizer->step(kRate, scale_of(1));
      zero_gradients(of.parameters);
    }
    for (const auto& parameter : of.parameters) {
      if (!is_matrix(parameter)) continue;
      SCOPED_TRACE(c10::str(parameter.name, ", expert-parallel size ", size));
      const auto expected = plain_muon(start.at(parameter.name), gradients.at(parameter.name),
                                       parts_of(parameter), muon);
      // An iteration's derivative is at most 3.4445 for small singular values: 5 of them grow errors of
      // the first by 3.4445⁵ < 500.
      EXPECT_TRUE(close(parameter.tensor, of.model->part(parameter.name, expected),
                        tolerance(torch::kFloat64, 500 * kSteps * 16, max_abs(expected) + 1)));
    }
  }
}

TEST(Muon, HasAdamWForTheOthers) {
  const auto& groups = parallel_groups();
  const ShardedModel::Options options{.num_experts = 5, .dtype = torch::kFloat64};
  OptimizerCase of(options, *groups.expert_parallel, groups);
  OptimizerCase other(options, *groups.expert_parallel, groups);
  const auto muon = muon_of(of.parameters, {});
  const auto adamw = make_adamw(other.parameters, {});
  for (int64_t step = 1; step <= kSteps; ++step) {
    of.set_gradients(step);
    other.set_gradients(step);
    muon->step(kRate, scale_of(1));
    adamw->step(kRate, scale_of(1));
  }
  for (size_t i = 0; i < of.parameters.size(); ++i) {
    if (is_matrix(of.parameters[i])) continue;
    EXPECT_TRUE(identical(of.parameters[i].tensor.detach(), other.parameters[i].tensor.detach()))
        << of.parameters[i].name;
  }
}

TEST(Muon, LeavesEverythingAsItIsForAScaleThatIsNotFinite) {
  const auto& groups = parallel_groups();
  OptimizerCase of({.dtype = torch::kBFloat16}, *groups.expert_parallel, groups);
  const auto optimizer = muon_of(of.parameters, {});
  of.set_gradients(1);
  optimizer->step(kRate, scale_of(1));
  std::vector<torch::Tensor> before;
  for (const auto& tensor : optimizer->state()) before.push_back(tensor.tensor.clone());
  optimizer->step(kRate, scale_of(std::numeric_limits<double>::quiet_NaN()));
  const auto after = optimizer->state();
  for (size_t i = 0; i < before.size(); ++i) {
    EXPECT_TRUE(identical(after[i].tensor, before[i])) << after[i].name;
  }
}

// The coefficients take every singular value of some size into about [0.68, 1.14] (Jordan), and bf16 adds its
// roundings.
TEST(Muon, MakesSingularValuesAboutOne) {
  Random random(test_seed());
  for (const auto dtype : all_dtypes()) {
    for (const auto& [rows, columns] : {std::pair{8, 64}, std::pair{64, 8}, std::pair{5, 40}}) {
      const auto matrices = on_device(random.normal({2, 3, rows, columns}, dtype));
      const auto found = orthogonalized(matrices);
      EXPECT_EQ(found.scalar_type(), dtype);
      EXPECT_EQ(found.sizes(), matrices.sizes());
      const auto values = torch::linalg_svdvals(found.to(torch::kCPU, torch::kFloat64));
      EXPECT_GT(values.min().item<double>(), 0.6) << to_string(dtype);
      EXPECT_LT(values.max().item<double>(), 1.25) << to_string(dtype);
    }
    EXPECT_EQ(max_abs(orthogonalized(on_device(torch::zeros({2, 3, 4}, dtype)))), 0);
    EXPECT_EQ(orthogonalized(on_device(torch::zeros({0, 3, 4}, dtype))).numel(), 0);
  }
}

}  // namespace
}  // namespace anabranch::test
