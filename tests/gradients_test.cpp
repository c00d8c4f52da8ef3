#include <anabranch/gradients.h>
#include <anabranch/moe_layer.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "support/devices.h"
#include "support/sharded_model.h"
#include "support/thrown.h"
#include "support/tolerance.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

constexpr int64_t kTinyBucket = 1;
constexpr int64_t kSmallBucket = 300;
constexpr int64_t kLargeBucket = 64 << 20;

std::vector<int> expert_parallel_sizes() {
  std::vector<int> sizes;
  for (int size = 1; size <= world()->size(); ++size) {
    if (world()->size() % size == 0) sizes.push_back(size);
  }
  return sizes;
}

uint64_t seed_of(int rank) { return test_seed() + 1000 + static_cast<uint64_t>(rank); }

/// Every rank's model as set_gradients left it, made anew here: needs no communication.
std::vector<std::shared_ptr<ShardedModel>> all_ranks(const ShardedModel::Options& options,
                                                     int expert_parallel_size) {
  std::vector<std::shared_ptr<ShardedModel>> models;
  for (int rank = 0; rank < world()->size(); ++rank) {
    models.push_back(std::make_shared<ShardedModel>(options, expert_parallel_size,
                                                    rank % expert_parallel_size, test_seed()));
    models.back()->set_gradients(seed_of(rank), /*holes=*/true);
  }
  return models;
}

struct Expected {
  torch::Tensor gradient;   ///< fp64
  torch::Tensor magnitude;  ///< Σ |terms| / W
};

/// (1/W) Σ over the ranks that hold the same parameter as `rank`.
Expected expected_gradient(const std::vector<std::shared_ptr<ShardedModel>>& models, int rank,
                           int expert_parallel_size, const std::string& name) {
  const bool is_expert = name.starts_with("experts.") || name.starts_with("block.experts.");
  const auto like = models[rank]->named_parameters()[name];
  auto sum = torch::zeros(like.sizes(), torch::kFloat64);
  auto magnitude = torch::zeros_like(sum);
  for (int other = 0; other < world()->size(); ++other) {
    if (is_expert && other % expert_parallel_size != rank % expert_parallel_size) continue;
    auto gradient = models[other]->named_parameters()[name].grad();
    if (!gradient.defined()) continue;
    gradient = gradient.to(torch::kCPU, torch::kFloat64);
    sum += gradient;
    magnitude += gradient.abs();
  }
  return {sum / world()->size(), magnitude / world()->size()};
}

std::shared_ptr<ShardedModel> finished_model(const ShardedModel::Options& options,
                                             const ParallelGroups& groups, int64_t bucket_bytes) {
  auto model = make_sharded_model(options, *groups.expert_parallel, test_seed());
  model->set_gradients(seed_of(world()->rank()), /*holes=*/true);
  finish_gradients(*model, groups, bucket_bytes);
  return model;
}

TEST(Gradients, AreTheMeanOverRanks) {
  for (const auto dtype : all_dtypes()) {
    for (const int size : expert_parallel_sizes()) {
      const ShardedModel::Options options{.num_experts = 5, .dtype = dtype};
      const auto groups = parallel_groups(size);
      const auto models = all_ranks(options, size);
      const auto model = finished_model(options, groups, kSmallBucket);
      for (const auto& item : model->named_parameters()) {
        SCOPED_TRACE(c10::str(item.key(), " ", dtype, ", expert-parallel size ", size));
        if (!item.value().requires_grad()) {
          EXPECT_FALSE(item.value().grad().defined());
          continue;
        }
        const auto expected = expected_gradient(models, world()->rank(), size, item.key());
        EXPECT_EQ(item.value().grad().scalar_type(), dtype);
        EXPECT_TRUE(close(item.value().grad(), expected.gradient,
                          tolerance(dtype, world()->size() + 1, expected.magnitude)));
      }
    }
  }
}

MoEOptions layer_options() {
  MoEOptions options;
  options.hidden_size = 6;
  options.expert_hidden_size = 5;
  options.shared_expert_hidden_size = 4;
  options.num_experts = 5;
  options.top_k = 2;
  options.glu = true;
  options.bias = true;
  options.dtype = torch::kFloat64;
  options.device = device();
  return options;
}

/// The mean over the tokens of Σ weights · output, backward.
void backward_of_mean(MoELayer& layer, const torch::Tensor& x, const torch::Tensor& weights) {
  ((layer->forward(x).output * weights).sum() / x.size(0)).backward();
}

// Contract 3, with expert-parallel groups inside data parallelism.
TEST(Gradients, OfALayerAreThoseOfOneRankWithTheWholeBatch) {
  constexpr int64_t kTokens = 7;  // of a rank
  Random random(test_seed());
  const int ranks = world()->size();
  const auto x = on_device(random.normal({ranks * kTokens, 6}));
  const auto weights = on_device(random.normal({ranks * kTokens, 6}));
  MoELayer whole(layer_options());
  backward_of_mean(whole, x, weights);
  const double expected_norm =
      gradient_norm(*whole, make_parallel_groups(make_self_communicator()));
  const auto expected = whole->named_parameters();

  for (const int size : expert_parallel_sizes()) {
    SCOPED_TRACE(c10::str("expert-parallel size ", size));
    const auto groups = parallel_groups(size);
    MoELayer layer(layer_options(), groups.expert_parallel);
    const int64_t first = world()->rank() * kTokens;
    backward_of_mean(layer, x.narrow(0, first, kTokens), weights.narrow(0, first, kTokens));
    finish_gradients(*layer, groups);
    // Rows of all stages one after another: hidden and inner sizes, tokens, experts.
    const int64_t length = 6 + 2 * 5 + 2 + ranks * kTokens;
    for (const auto& parameter : parallel_parameters(*layer)) {
      auto wanted = expected[parameter.name].grad();
      const double magnitude = max_abs(wanted);
      if (parameter.is_expert) {
        wanted = wanted.narrow(0, parameter.first_place, parameter.tensor.size(0));
      }
      EXPECT_TRUE(close(parameter.tensor.grad(), wanted,
                        tolerance(torch::kFloat64, length, magnitude, /*roundings=*/10)))
          << parameter.name;
    }
    EXPECT_NEAR(gradient_norm(*layer, groups), expected_norm,
                tolerance(torch::kFloat64, length, expected_norm, /*roundings=*/10));
  }
}

TEST(Gradients, DoNotDependOnTheBuckets) {
  for (const int size : expert_parallel_sizes()) {
    const auto groups = parallel_groups(size);
    const auto expected = finished_model({}, groups, kLargeBucket);
    for (const int64_t bucket_bytes : {kTinyBucket, kSmallBucket, kLargeBucket}) {
      const auto model = finished_model({}, groups, bucket_bytes);
      for (const auto& item : model->named_parameters()) {
        EXPECT_TRUE(identical(item.value().grad(), expected->named_parameters()[item.key()].grad()))
            << item.key() << " in buckets of " << bucket_bytes;
      }
    }
  }
}

TEST(Gradients, TravelInFewMessages) {
  ANABRANCH_NEEDS_RANKS(2);
  const auto groups = parallel_groups(1);
  world()->reset_traffic();
  groups.expert_replicas->reset_traffic();
  finished_model({}, groups, kLargeBucket);
  EXPECT_EQ(world()->traffic().collectives, 1);
  EXPECT_EQ(groups.expert_replicas->traffic().collectives, 1);
}

TEST(Gradients, HalfPrecisionSumsDoNotOverflow) {
  ANABRANCH_NEEDS_RANKS(2);
  const auto groups = parallel_groups(1);
  const auto model = make_sharded_model({.dtype = torch::kFloat16}, *groups.expert_parallel, 1);
  const double large = 60000;  // the largest fp16 number is 65504
  for (const auto& parameter : model->parameters()) {
    if (parameter.requires_grad()) parameter.mutable_grad() = torch::full_like(parameter, large);
  }
  finish_gradients(*model, groups);
  for (const auto& parameter : model->parameters()) {
    if (!parameter.requires_grad()) continue;
    EXPECT_TRUE((parameter.grad() == large).all().item<bool>());
  }
}

TEST(Gradients, RefusesWrongInput) {
  const auto groups = parallel_groups();
  const auto model = make_sharded_model({}, *groups.expert_parallel, 1);
  EXPECT_INPUT_ERROR(finish_gradients(*model, groups, 0), "bucket_bytes");
  auto gate = model->named_parameters()["gate"];
  gate.mutable_grad() = torch::zeros_like(gate).to_sparse();
  EXPECT_INPUT_ERROR(finish_gradients(*model, groups), "the gradient of gate must be dense");
}

/// The norm of the finished gradient of the whole model.
double expected_norm(const ShardedModel::Options& options, int expert_parallel_size) {
  const auto models = all_ranks(options, expert_parallel_size);
  double sum = 0;
  for (const auto& parameter : parallel_parameters(*models[0])) {
    if (!parameter.tensor.requires_grad()) continue;
    const int owners = parameter.is_expert ? expert_parallel_size : 1;
    for (int rank = 0; rank < owners; ++rank) {
      sum += expected_gradient(models, rank, expert_parallel_size, parameter.name)
                 .gradient.square()
                 .sum()
                 .item<double>();
    }
  }
  return std::sqrt(sum);
}

void expect_same_on_all_ranks(double value) {
  const auto all = world()->all_gather(torch::tensor({value}, torch::kFloat64));
  EXPECT_TRUE(identical(all, all[world()->rank()].expand_as(all)));
}

TEST(Gradients, NormCountsEachExpertOnce) {
  for (const auto dtype : all_dtypes()) {
    for (const int size : expert_parallel_sizes()) {
      SCOPED_TRACE(c10::str(dtype, ", expert-parallel size ", size));
      const ShardedModel::Options options{.num_experts = 3, .dtype = dtype};
      const auto groups = parallel_groups(size);
      const auto model = finished_model(options, groups, kLargeBucket);
      const double norm = gradient_norm(*model, groups);
      const double expected = expected_norm(options, size);
      // Each element is off by a rounding to the type and W + 1 in the sum before.
      EXPECT_NEAR(norm, expected, tolerance(dtype, world()->size() + 1, expected));
      EXPECT_EQ(norm, gradient_norm(*model, groups));
      expect_same_on_all_ranks(norm);
    }
  }
}

TEST(Gradients, NormOfNothingIsZero) {
  const auto groups = parallel_groups();
  const auto model = make_sharded_model({}, *groups.expert_parallel, 1);
  EXPECT_EQ(gradient_norm(*model, groups), 0.0);
  EXPECT_EQ(clip_gradient_norm(*model, 1.0, groups), 0.0);
}

TEST(Gradients, NormOfATensorInManyPieces) {
  torch::nn::Module model;
  const int64_t elements = (int64_t{1} << 22) * 2 + 3;
  auto parameter = model.register_parameter("parameter", on_device(torch::zeros({elements})));
  parameter.mutable_grad() = torch::full_like(parameter, 3.0);
  const auto groups = parallel_groups();
  const double expected = 3 * std::sqrt(static_cast<double>(elements));
  EXPECT_NEAR(gradient_norm(model, groups), expected, 1e-12 * expected);
}

TEST(Gradients, NormLeavesDoublePrecisionGradientsAlone) {
  const auto groups = parallel_groups();
  const auto model = finished_model({.dtype = torch::kFloat64}, groups, kLargeBucket);
  const auto before = model->named_parameters()["gate"].grad().clone();
  gradient_norm(*model, groups);
  EXPECT_TRUE(identical(model->named_parameters()["gate"].grad(), before));
}

TEST(Gradients, ClippingScalesTheWholeGradient) {
  for (const int size : expert_parallel_sizes()) {
    const auto groups = parallel_groups(size);
    const auto before = finished_model({}, groups, kLargeBucket);
    const auto model = finished_model({}, groups, kLargeBucket);
    const double norm = gradient_norm(*before, groups);

    EXPECT_EQ(clip_gradient_norm(*model, 2 * norm, groups), norm);
    EXPECT_EQ(clip_gradient_norm(*model, std::numeric_limits<double>::infinity(), groups), norm);
    EXPECT_EQ(gradient_norm(*model, groups), norm);

    EXPECT_EQ(clip_gradient_norm(*model, norm / 3, groups), norm);
    for (const auto& parameter : parallel_parameters(*model)) {
      if (!parameter.tensor.requires_grad()) continue;
      const auto unclipped =
          before->named_parameters()[parameter.name].grad().to(torch::kCPU, torch::kFloat64) / 3;
      // The factor is rounded to the gradient's type, and so is the product.
      EXPECT_TRUE(close(parameter.tensor.grad(), unclipped,
                        tolerance(torch::kFloat32, 0, unclipped.abs(), 2)))
          << parameter.name;
    }
    EXPECT_NEAR(gradient_norm(*model, groups), norm / 3, tolerance(torch::kFloat32, 2, norm / 3));
  }
}

TEST(Gradients, ClippingRefusesWrongInput) {
  const auto groups = parallel_groups();
  const auto model = finished_model({}, groups, kLargeBucket);
  EXPECT_INPUT_ERROR(clip_gradient_norm(*model, 0.0, groups), "max_norm");
  EXPECT_INPUT_ERROR(clip_gradient_norm(*model, -1.0, groups), "max_norm");
  EXPECT_INPUT_ERROR(clip_gradient_norm(*model, std::nan(""), groups), "max_norm");
  EXPECT_INPUT_ERROR(clip_gradient_norm(*model, 1.0, groups, 0.0), "loss_scale");
  // One rank's expert is enough for all to refuse.
  for (const double wrong : {std::nan(""), std::numeric_limits<double>::infinity()}) {
    if (world()->rank() == 0) {
      model->named_parameters()["experts.up_weight"].mutable_grad()[0][0][0] = wrong;
    }
    EXPECT_INPUT_ERROR(clip_gradient_norm(*model, 1.0, groups), "the gradient's norm is");
  }
}

/// The last number of rank `rank`'s gradient of `name` becomes `number`.
void spoil(ShardedModel& model, const std::string& name, int rank, double number) {
  if (world()->rank() != rank) return;
  auto gradient = model.named_parameters()[name].mutable_grad().view(-1);
  gradient[gradient.numel() - 1] = number;
}

bool is_finite(const torch::Tensor& tensor) { return tensor.isfinite().all().item<bool>(); }

// What a loss scaler sees on any rank it sees on all.
TEST(Gradients, ThatAreNotFiniteOnOneRankAreSoOnAll) {
  for (const auto dtype : {torch::kFloat32, torch::kFloat16, torch::kFloat64}) {
    for (const int size : expert_parallel_sizes()) {
      const auto groups = parallel_groups(size);
      for (const std::string name : {"experts.down_weight", "block.experts.up_weight", "gate"}) {
        for (const double number : {std::nan(""), -std::numeric_limits<double>::infinity()}) {
          SCOPED_TRACE(c10::str(name, " ", number, " ", dtype, ", expert-parallel size ", size));
          const auto model =
              make_sharded_model({.dtype = dtype}, *groups.expert_parallel, test_seed());
          model->set_gradients(seed_of(world()->rank()));
          // The single expert is on the first rank of each group.
          const int rank = name == "block.experts.up_weight" ? 0 : world()->size() - 1;
          spoil(*model, name, rank, number);
          finish_gradients(*model, groups);
          EXPECT_FALSE(gradients_are_finite(*model, groups));
          bool finite = true;
          for (const auto& parameter : model->parameters()) {
            if (parameter.grad().defined()) finite = finite && is_finite(parameter.grad());
          }
          EXPECT_FALSE(finite);
        }
      }
    }
  }
}

TEST(Gradients, ThatAreFiniteAreSaidToBe) {
  const auto groups = parallel_groups();
  const auto model = finished_model({}, groups, kLargeBucket);
  EXPECT_TRUE(gradients_are_finite(*model, groups));
}

TEST(Gradients, ClippingKnowsTheScaleOfTheLoss) {
  const auto groups = parallel_groups();
  const double scale = 1024;
  const auto plain = finished_model({}, groups, kLargeBucket);
  const auto scaled = finished_model({}, groups, kLargeBucket);
  for (const auto& parameter : parallel_parameters(*scaled)) {  // each once, a tied one too
    if (parameter.gradient().defined()) parameter.gradient().mul_(scale);
  }
  const double norm = gradient_norm(*plain, groups);
  EXPECT_EQ(clip_gradient_norm(*scaled, 2 * norm, groups, scale), norm);
  EXPECT_EQ(clip_gradient_norm(*scaled, norm / 3, groups, scale), norm);
  EXPECT_EQ(clip_gradient_norm(*plain, norm / 3, groups), norm);
  for (const auto& item : plain->named_parameters()) {
    if (!item.value().grad().defined()) continue;
    EXPECT_TRUE(
        identical(scaled->named_parameters()[item.key()].grad(), item.value().grad() * scale));
  }
  // Skipped later: neither an error nor a change.
  spoil(*scaled, "experts.up_weight", world()->size() - 1, std::nan(""));
  const auto before = scaled->named_parameters()["gate"].grad().clone();
  EXPECT_FALSE(std::isfinite(clip_gradient_norm(*scaled, norm / 9, groups, scale)));
  EXPECT_TRUE(identical(scaled->named_parameters()["gate"].grad(), before));
}

/// As a backward does.
void add_to_gradients(const ShardedModel& model, double value) {
  for (const auto& parameter : parallel_parameters(model)) {
    if (parameter.gradient().defined()) parameter.gradient().add_(value);
  }
}

TEST(Gradients, AreFinishedOnce) {
  ANABRANCH_NEEDS_RANKS(2);
  for (const int size : expert_parallel_sizes()) {
    const auto groups = parallel_groups(size);
    const auto model = finished_model({}, groups, kLargeBucket);
    EXPECT_INPUT_ERROR(finish_gradients(*model, groups), "is finished already");
    clip_gradient_norm(*model, gradient_norm(*model, groups) / 2, groups);
    EXPECT_INPUT_ERROR(finish_gradients(*model, groups), "is finished already");
    add_to_gradients(*model, 1.0);
    EXPECT_INPUT_ERROR(finish_gradients(*model, groups), "a backward has added to");
  }
}

TEST(Gradients, OfTheNextStepAreFinishedAgain) {
  ANABRANCH_NEEDS_RANKS(2);
  const auto groups = parallel_groups();
  const double ranks = world()->size();
  for (const bool set_to_none : {true, false}) {
    SCOPED_TRACE(set_to_none);
    const auto model = finished_model({}, groups, kLargeBucket);
    auto weight = model->named_parameters()["experts.up_weight"];
    for (int step = 0; step < 3; ++step) {
      model->zero_grad(set_to_none);
      if (step == 1) {  // no backward
        finish_gradients(*model, groups);
        model->zero_grad(set_to_none);
      }
      if (set_to_none) {
        weight.mutable_grad() = torch::full_like(weight, ranks);
      } else {
        weight.mutable_grad().add_(ranks);
      }
      finish_gradients(*model, groups);
      EXPECT_TRUE(identical(weight.grad(), torch::ones_like(weight)));
    }
  }
}

TEST(Gradients, TheNormIsOfFinishedOnes) {
  ANABRANCH_NEEDS_RANKS(2);
  const auto groups = parallel_groups(1);
  const auto model = make_sharded_model({}, *groups.expert_parallel, 1);
  model->set_gradients(seed_of(world()->rank()));
  EXPECT_INPUT_ERROR(gradient_norm(*model, groups), "finish_gradients goes before");
  EXPECT_INPUT_ERROR(clip_gradient_norm(*model, 1.0, groups), "finish_gradients goes before");
}

}  // namespace
}  // namespace anabranch::test
