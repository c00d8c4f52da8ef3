#include <anabranch/checkpoint.h>
#include <gtest/gtest.h>
#include <torch/optim/adamw.h>

#include <cmath>
#include <limits>

#include "optimizers/optimizer_case.h"
#include "support/shared_directory.h"
#include "support/tolerance.h"

namespace anabranch::test {
namespace {

constexpr double kScale = 0.25;

/// Kingma and Ba's algorithm with Loshchilov and Hutter's decay, as their papers write it, in fp64.
struct Oracle {
  torch::Tensor value, mean, square;
  torch::Tensor magnitude;  ///< Σ |terms| of all that was ever added to the value

  explicit Oracle(const torch::Tensor& start)
      : value(start.detach().to(torch::kCPU, torch::kFloat64).clone()),
        mean(torch::zeros_like(value)),
        square(torch::zeros_like(value)),
        magnitude(value.abs()) {}

  void step(const torch::Tensor& gradient, int64_t number, const AdamWOptions& options) {
    const auto g = gradient.to(torch::kCPU, torch::kFloat64) * kScale;
    const double decay = value.dim() > 1 ? options.weight_decay : 0;
    mean = options.beta1 * mean + (1 - options.beta1) * g;
    square = options.beta2 * square + (1 - options.beta2) * g * g;
    const auto root = (square / (1 - std::pow(options.beta2, number))).sqrt() + options.epsilon;
    const auto change = mean / (1 - std::pow(options.beta1, number)) / root + decay * value;
    value = value - kRate * change;
    // The mean is a sum of numbers no larger than root · √(1 / (1 − β2)).
    magnitude += kRate * (change.abs() + 1 / std::sqrt(1 - options.beta2));
  }
};

std::map<std::string, Oracle> oracle_after(const ShardedModel::Options& options,
                                           const AdamWOptions& adamw, int64_t steps) {
  const auto whole = make_whole_model(options, test_seed());
  std::map<std::string, Oracle> oracles;
  for (const auto& item : whole->named_parameters()) oracles.emplace(item.key(), item.value());
  for (int64_t step = 1; step <= steps; ++step) {
    whole->set_gradients(test_seed() + static_cast<uint64_t>(step));
    for (const auto& item : whole->named_parameters()) {
      if (item.value().grad().defined()) {
        oracles.at(item.key()).step(item.value().grad(), step, adamw);
      }
    }
  }
  return oracles;
}

void take_steps(OptimizerCase& of, ParallelOptimizer& optimizer, int64_t first, int64_t last) {
  for (int64_t step = first; step <= last; ++step) {
    of.set_gradients(step);
    optimizer.step(kRate, scale_of(kScale));
    zero_gradients(of.parameters);
  }
}

TEST(AdamW, IsThePapersAtEveryLayout) {
  for (const auto dtype : all_dtypes()) {
    const ShardedModel::Options options{.num_experts = 5, .dtype = dtype};
    const AdamWOptions adamw;
    const auto oracles = oracle_after(options, adamw, kSteps);
    for (const int size : expert_parallel_sizes()) {
      const auto& groups = parallel_groups(size);
      OptimizerCase of(options, *groups.expert_parallel, groups);
      const auto optimizer = make_adamw(of.parameters, adamw);
      take_steps(of, *optimizer, 1, kSteps);
      const auto state = named(optimizer->state());
      for (const auto& parameter : of.parameters) {
        SCOPED_TRACE(c10::str(parameter.name, " ", dtype, ", expert-parallel size ", size));
        const auto& oracle = oracles.at(parameter.name);
        const auto master = state.find("optimizer.master." + parameter.name);
        const bool reduced = accumulation_type(dtype) != dtype;
        ASSERT_EQ(master != state.end(), reduced);
        const auto& value = reduced ? master->second : parameter.tensor;
        EXPECT_TRUE(close(value, of.model->part(parameter.name, oracle.value),
                          tolerance(accumulation_type(dtype), 16 * kSteps,
                                    of.model->part(parameter.name, oracle.magnitude))));
        if (reduced) {
          EXPECT_TRUE(identical(parameter.tensor.detach(), value.to(dtype)));
        }
      }
    }
  }
}

TEST(AdamW, OnTheCpuHasTheBitsOfLibTorchs) {
  if (device() != torch::kCPU) GTEST_SKIP() << "a GPU computes in one kernel";
  const auto& groups = parallel_groups();
  OptimizerCase of({.num_experts = 5}, *groups.expert_parallel, groups);
  OptimizerCase other({.num_experts = 5}, *groups.expert_parallel, groups);
  const auto optimizer = make_adamw(of.parameters, {.weight_decay = 0});
  std::vector<torch::Tensor> tensors;
  for (const auto& parameter : other.parameters) tensors.push_back(parameter.tensor);
  torch::optim::AdamW expected(
      tensors, torch::optim::AdamWOptions(kRate).betas({0.9, 0.95}).eps(1e-8).weight_decay(0));
  for (int64_t step = 1; step <= kSteps; ++step) {
    of.set_gradients(step);
    optimizer->step(kRate, scale_of(1));
    other.set_gradients(step);
    expected.step();
  }
  for (size_t i = 0; i < tensors.size(); ++i) {
    EXPECT_TRUE(identical(of.parameters[i].tensor.detach(), tensors[i].detach()))
        << of.parameters[i].name;
  }
}

TEST(AdamW, LeavesEverythingAsItIsForAScaleThatIsNotFinite) {
  for (const double scale :
       {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    for (const auto state_type : {torch::kFloat32, torch::kBFloat16}) {
      const auto& groups = parallel_groups();
      const ShardedModel::Options options{.dtype = torch::kBFloat16};
      OptimizerCase of(options, *groups.expert_parallel, groups);
      const auto optimizer = make_adamw(of.parameters, {.state = state_type});
      take_steps(of, *optimizer, 1, 1);
      std::vector<torch::Tensor> before;
      for (const auto& tensor : optimizer->state()) before.push_back(tensor.tensor.clone());
      of.set_gradients(2);
      optimizer->step(kRate, scale_of(scale));
      const auto after = optimizer->state();
      for (size_t i = 0; i < before.size(); ++i) {
        EXPECT_TRUE(identical(after[i].tensor, before[i])) << after[i].name;
      }
    }
  }
}

// One of the two neighbours in bf16, on the average the number itself.
TEST(AdamW, RoundsItsStateStochastically) {
  constexpr int64_t kCount = 1 << 18;
  torch::nn::Module model;
  const auto parameter = model.register_parameter(
      "x", torch::zeros({kCount}, torch::dtype(torch::kFloat32).device(device())));
  const auto groups = make_parallel_groups(make_self_communicator());
  const auto parameters = trained_parameters(model, groups);
  const auto optimizer = make_adamw(parameters, {.state = torch::kBFloat16, .seed = test_seed()});
  const double wanted = 1 + Random(test_seed()).uniform();
  parameter.mutable_grad() = torch::full_like(parameter, wanted / (1 - 0.9)).detach();
  optimizer->step(kRate, scale_of(1));
  const auto mean =
      named(optimizer->state()).at("optimizer.exp_avg.x").to(torch::kCPU, torch::kFloat64);
  const double spacing = std::ldexp(1, -7);  // of bf16 between 1 and 2
  const double down = std::floor(wanted / spacing) * spacing;
  const double error = 4 * unit_roundoff(torch::kFloat32);
  EXPECT_TRUE(((mean - down).abs() < error)
                  .logical_or((mean - down - spacing).abs() < error)
                  .all()
                  .item<bool>());
  // A mean of so many independent roundings has this deviation at most; noise has 16 bits.
  const double deviation = spacing / 2 / std::sqrt(kCount);
  EXPECT_NEAR(mean.mean().item<double>(), wanted, 6 * deviation + spacing / (1 << 16) + error);
}

TEST(AdamW, RoundsAlikeAtEveryLayout) {
  const ShardedModel::Options options{.num_experts = 5, .dtype = torch::kBFloat16};
  const AdamWOptions adamw{.state = torch::kBFloat16, .seed = test_seed()};
  const auto alone = make_parallel_groups(make_self_communicator());
  OptimizerCase whole(options, *alone.expert_parallel, alone);
  const auto expected_optimizer = make_adamw(whole.parameters, adamw);
  take_steps(whole, *expected_optimizer, 1, kSteps);
  const auto expected = named(expected_optimizer->state());
  for (const int size : expert_parallel_sizes()) {
    const auto& groups = parallel_groups(size);
    OptimizerCase of(options, *groups.expert_parallel, groups);
    const auto optimizer = make_adamw(of.parameters, adamw);
    take_steps(of, *optimizer, 1, kSteps);
    const auto state = named(optimizer->state());
    for (const auto& parameter : of.parameters) {
      for (const char* slot : {"exp_avg", "exp_avg_sq", "master"}) {
        const auto name = c10::str("optimizer.", slot, ".", parameter.name);
        EXPECT_TRUE(identical(state.at(name), of.model->part(parameter.name, expected.at(name))))
            << name << ", expert-parallel size " << size;
      }
    }
  }
}

TEST(AdamW, GoesOnFromACheckpointAtAnyLayout) {
  const ShardedModel::Options options{.num_experts = 5, .dtype = torch::kBFloat16};
  const AdamWOptions adamw{.state = torch::kBFloat16, .seed = test_seed()};
  for (const int size : expert_parallel_sizes()) {
    const SharedDirectory directory;
    const auto& groups = parallel_groups(size);
    OptimizerCase of(options, *groups.expert_parallel, groups);
    const auto optimizer = make_adamw(of.parameters, adamw);
    take_steps(of, *optimizer, 1, 2);
    save_checkpoint(directory.path(), *of.model, *optimizer, {{"step", "2"}}, groups);

    const auto& all = parallel_groups();
    OptimizerCase other(options, *all.expert_parallel, all);
    other.model->fill(test_seed() + 1);
    const auto resumed = make_adamw(other.parameters, adamw);
    const auto metadata = load_checkpoint(directory.path(), *other.model, *resumed, all);
    EXPECT_EQ(metadata.at("step"), "2");
    take_steps(other, *resumed, 3, kSteps);

    OptimizerCase straight(options, *all.expert_parallel, all);
    const auto expected = make_adamw(straight.parameters, adamw);
    take_steps(straight, *expected, 1, kSteps);
    const auto found = named(resumed->state());
    for (const auto& [name, tensor] : named(expected->state())) {
      EXPECT_TRUE(identical(found.at(name), tensor)) << name << ", saved at size " << size;
    }
  }
}

TEST(GradientScale, IsWhatClippingMultipliesBy) {
  for (const int size : expert_parallel_sizes()) {
    const auto& groups = parallel_groups(size);
    OptimizerCase of({.num_experts = 5}, *groups.expert_parallel, groups);
    of.set_gradients(1);
    const auto gradients = gradients_of(of.parameters);
    const double norm = gradient_norm(gradients, *groups.world, size);
    for (const double most : {0.0, norm / 3, norm * 3}) {
      const auto found = gradient_scale(gradients, most, *groups.world, size);
      EXPECT_EQ(found.norm.item<double>(), norm);
      EXPECT_EQ(found.scale.item<double>(), most > 0 && most < norm ? most / norm : 1.0);
    }
    gradients.replicated.front().fill_(std::numeric_limits<double>::infinity());
    EXPECT_TRUE(std::isnan(gradient_scale(gradients, 1, *groups.world, size).scale.item<double>()));
  }
}

}  // namespace
}  // namespace anabranch::test
