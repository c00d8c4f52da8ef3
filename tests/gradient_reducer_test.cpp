// GradientReducer against finish_gradients: the same bits, and before backward has ended.
#include <anabranch/gradient_reducer.h>
#include <anabranch/moe_layer.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/nn/modules/linear.h>

#include <chrono>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "gradient_lane.h"
#include "support/devices.h"
#include "support/random.h"
#include "support/thrown.h"
#include "support/tolerance.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

constexpr int64_t kHidden = 6;

/// Calls on its way back.
struct OnBackward : torch::autograd::Function<OnBackward> {
  using Call = std::function<void()>;
  struct Holder : torch::CustomClassHolder {
    explicit Holder(Call call) : call(std::move(call)) {}
    Call call;
  };
  static torch::Tensor forward(torch::autograd::AutogradContext* context, const torch::Tensor& x,
                               const Call& call) {
    context->saved_data["call"] = torch::IValue::make_capsule(c10::make_intrusive<Holder>(call));
    return x.clone();
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients) {
    c10::static_intrusive_pointer_cast<Holder>(context->saved_data["call"].toCapsule())->call();
    return {gradients[0], torch::Tensor()};
  }
};

MoEOptions layer_options(torch::Dtype dtype) {
  MoEOptions options;
  options.hidden_size = kHidden;
  options.expert_hidden_size = 5;
  options.shared_expert_hidden_size = 4;
  options.num_experts = 5;
  options.top_k = 2;
  options.bias = true;
  options.dtype = dtype;
  options.device = device();
  options.engine = "deterministic";
  return options;
}

/// x [T, 6] → [T, 6]: a projection, a layer, a projection; and a factor that not every rank uses.
struct Model : torch::nn::Module {
  Model(const ParallelGroups& groups, torch::Dtype dtype) {
    torch::manual_seed(static_cast<int64_t>(test_seed() >> 1));
    const torch::nn::LinearOptions square(kHidden, kHidden);
    before = register_module("before", torch::nn::Linear(square));
    factor = register_parameter("factor", torch::randn({kHidden}));
    layer = register_module("layer", MoELayer(layer_options(dtype), groups.expert_parallel));
    after = register_module("after", torch::nn::Linear(square));
    for (auto* module : {&before, &after}) (*module)->to(device(), dtype);
    factor.set_data(factor.to(device(), dtype));
  }

  torch::Tensor forward(
      const torch::Tensor& x, bool with_factor, const OnBackward::Call& between = [] {}) {
    auto rows = before->forward(x);
    if (with_factor) rows = rows * factor;
    return after->forward(layer->forward(OnBackward::apply(rows, between)).output);
  }

  torch::nn::Linear before{nullptr};
  torch::Tensor factor;
  MoELayer layer{nullptr};
  torch::nn::Linear after{nullptr};
};

/// Rank 0 has no tokens in the first micro-batch of each step.
torch::Tensor batch(int step, int micro, torch::Dtype dtype) {
  const int rank = world()->rank();
  Random random(test_seed() + 100 * step + 10 * micro + rank);
  const int64_t tokens = rank == 0 && micro == 0 ? 0 : 3 + 2 * rank + micro;
  return on_device(random.normal({tokens, kHidden})).to(dtype);
}

/// In the first steps the factor has no gradient on some ranks, and in the last micro-batch on none.
void backward(Model& model, int step, int micro, torch::Dtype dtype) {
  const bool with_factor = micro == 0 && world()->rank() % 2 == 1;
  model.forward(batch(step, micro, dtype), with_factor).square().sum().backward();
}

void expect_identical(const Model& model, const Model& expected) {
  for (const auto& item : model.named_parameters()) {
    const auto wanted = expected.named_parameters()[item.key()].grad();
    ASSERT_TRUE(item.value().grad().defined()) << item.key();
    EXPECT_TRUE(identical(item.value().grad(), wanted)) << item.key();
  }
}

/// Whatever was before: `expected` finishes its gradients itself.
void expect_a_right_step(GradientReducer& reducer, Model& model, Model& expected,
                         const ParallelGroups& groups) {
  model.zero_grad();
  reducer.start();
  for (auto* each : {&model, &expected}) backward(*each, 0, 1, torch::kFloat32);
  reducer.finish();
  finish_gradients(expected, groups);
  expect_identical(model, expected);
}

std::vector<int> expert_parallel_sizes() {
  std::vector<int> sizes;
  for (int size = 1; size <= world()->size(); ++size) {
    if (world()->size() % size == 0) sizes.push_back(size);
  }
  return sizes;
}

TEST(GradientReducer, GivesTheBitsOfFinishGradients) {
  // A reducer's groups take NCCL a second: not every pair.
  const std::vector<std::pair<torch::Dtype, int64_t>> cases = {
      {torch::kFloat32, 1}, {torch::kBFloat16, 200}, {torch::kFloat32, kBucketBytes}};
  for (const auto& [dtype, bucket_bytes] : cases) {
    for (const int size : expert_parallel_sizes()) {
      SCOPED_TRACE(c10::str(dtype, ", expert-parallel size ", size, ", ", bucket_bytes));
      const auto& groups = parallel_groups(size);
      Model expected(groups, dtype), model(groups, dtype);
      GradientReducer reducer(model, groups, bucket_bytes);
      for (int step = 0; step < 3; ++step) {
        for (auto* each : {&expected, &model}) {
          each->zero_grad(/*set_to_none=*/step == 1);
          for (int micro = 0; micro < 2; ++micro) {
            if (each == &model && micro == 1) reducer.start();
            backward(*each, step, micro, dtype);
          }
        }
        finish_gradients(expected, groups, bucket_bytes);
        const auto not_finite = reducer.finish();
        EXPECT_EQ(not_finite.item<double>(), 0);
        expect_identical(model, expected);
      }
    }
  }
}

TEST(GradientReducer, SumsBesideBackward) {
  ANABRANCH_NEEDS_RANKS(2);
  if (world()->split_order(device()) == SplitOrder::kOne) GTEST_SKIP() << "all in finish";
  for (const int size : expert_parallel_sizes()) {
    const auto& groups = parallel_groups(size);
    Model model(groups, torch::kFloat32);
    GradientReducer reducer(model, groups, /*bucket_bytes=*/1);
    reducer.start();
    // Weight and bias of the last projection, and what of the layer has no tokens to wait for.
    int64_t summed = 0;
    const auto wait = [&] {
      const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(30);
      while ((summed = reducer.summed()) < 2 && std::chrono::steady_clock::now() < end) {
        std::this_thread::yield();
      }
    };
    model.forward(batch(0, 1, torch::kFloat32), true, wait).square().sum().backward();
    reducer.finish();
    EXPECT_GE(summed, 2);
  }
}

// As over NCCL, whichever message is complete first.
TEST(GradientLane, CallsInTheOrderOfItsMessages) {
  GradientLane lane(world()->split(0, world()->rank()), /*divisor=*/world()->size());
  std::vector<torch::Tensor> gradients;
  for (int message = 0; message < 3; ++message) {
    gradients.push_back(on_device(torch::full({2}, 10.0 * message + world()->rank())));
  }
  for (int step = 0; step < 2; ++step) {
    lane.begin(gradients.size(), GradientLane::Caller::kSend);
    lane.send(1, {gradients[1]});
    EXPECT_EQ(lane.summed(), 0);
    lane.send(0, {gradients[0]});
    EXPECT_EQ(lane.summed(), 2);
    lane.send(2, {gradients[2]});
    EXPECT_EQ(lane.summed(), 3);
    lane.end();
    lane.bring_back();
    for (int message = 0; message < 3; ++message) {
      const double mean = 10.0 * message + 0.5 * (world()->size() - 1);
      EXPECT_TRUE((gradients[message] == mean).all().item<bool>()) << gradients[message];
    }
  }
}

// A backward that completes a message is not the one to fail.
TEST(GradientLane, TellsInEndWhatHasFailed) {
  GradientLane lane(world()->split(0, world()->rank()), /*divisor=*/1);
  lane.begin(2, GradientLane::Caller::kSend);
  lane.send(0, {on_device(torch::ones({2}, torch::kBool))});  // which no communicator sums
  lane.send(1, {on_device(torch::ones({2}))});
  EXPECT_EQ(lane.summed(), 0);
  EXPECT_INPUT_ERROR(lane.end(), "cannot sum");
}

TEST(GradientReducer, TakesMainGradients) {
  const auto& groups = parallel_groups();
  Model expected(groups, torch::kBFloat16), model(groups, torch::kBFloat16);
  std::vector<WeightSums> sums;
  for (auto* each : {&expected, &model}) {
    auto experts = each->layer->experts();
    experts->main_grad = {torch::ones_like(experts->up_weight, torch::kFloat32),
                          torch::ones_like(experts->down_weight, torch::kFloat32)};
    sums.push_back(experts->main_grad);
  }
  GradientReducer reducer(model, groups);
  reducer.start();
  for (auto* each : {&expected, &model}) backward(*each, 0, 1, torch::kBFloat16);
  finish_gradients(expected, groups);
  reducer.finish();
  EXPECT_TRUE(identical(sums[1].up, sums[0].up));
  EXPECT_TRUE(identical(sums[1].down, sums[0].down));
}

TEST(GradientReducer, TakesMeansOfAFewMoreNumbers) {
  const auto& groups = parallel_groups();
  Model model(groups, torch::kFloat32);
  GradientReducer reducer(model, groups);
  reducer.start();
  const auto numbers = on_device(torch::full({2}, 3.0 * world()->rank()));
  reducer.finish({numbers});
  if (world()->size() > 1) {
    EXPECT_TRUE((numbers == 1.5 * (world()->size() - 1)).all().item<bool>());
  }
}

TEST(GradientReducer, TellsAllRanksOfWhatIsNotFinite) {
  ANABRANCH_NEEDS_RANKS(2);
  const auto& groups = parallel_groups();
  Model model(groups, torch::kFloat32);
  GradientReducer reducer(model, groups);
  for (const bool finite : {false, true}) {
    model.zero_grad();
    reducer.start();
    auto x = batch(0, 1, torch::kFloat32);
    const auto loss = model.forward(x, true).square().sum();
    if (!finite && world()->rank() == world()->size() - 1) {
      (loss * std::numeric_limits<double>::infinity()).backward();
    } else {
      loss.backward();
    }
    const double said = reducer.finish().item<double>();
    EXPECT_EQ(std::isnan(said), !finite);
    EXPECT_EQ(gradients_are_finite(model, groups), finite);
  }
}

TEST(GradientReducer, RefusesToBeCalledOutOfOrder) {
  const auto& groups = parallel_groups();
  Model model(groups, torch::kFloat32), expected(groups, torch::kFloat32);
  EXPECT_INPUT_ERROR(GradientReducer(model, groups, 0), "bucket_bytes");
  GradientReducer reducer(model, groups);
  EXPECT_INPUT_ERROR(reducer.finish(), "finish without start");
  reducer.start();
  EXPECT_INPUT_ERROR(reducer.start(), "start again before finish");
  reducer.finish();
  if (world()->size() > 1) {
    EXPECT_INPUT_ERROR(reducer.start(), "is finished already");
    backward(model, 0, 1, torch::kFloat32);
    EXPECT_INPUT_ERROR(reducer.start(), "a backward has added to");
    model.zero_grad();
    reducer.start();
    backward(model, 0, 1, torch::kFloat32);
    backward(model, 0, 1, torch::kFloat32);
    EXPECT_INPUT_ERROR(reducer.finish(), "has changed since it was taken");
  }
  // And the next step is right.
  expect_a_right_step(reducer, model, expected, groups);
}

TEST(GradientReducer, GoesOnAfterABackwardThatThrows) {
  const auto& groups = parallel_groups();
  Model model(groups, torch::kFloat32), expected(groups, torch::kFloat32);
  GradientReducer reducer(model, groups, /*bucket_bytes=*/1);
  reducer.start();
  const auto loss =
      model.forward(batch(0, 1, torch::kFloat32), true, [] { throw std::runtime_error("memory"); })
          .sum();
  EXPECT_THROW(loss.backward(), std::runtime_error);
  reducer.finish();
  expect_a_right_step(reducer, model, expected, groups);
}

TEST(GradientReducer, LeavesNoHooksBehind) {
  const auto& groups = parallel_groups();
  Model model(groups, torch::kFloat32);
  {
    GradientReducer reducer(model, groups);
    reducer.start();
  }
  backward(model, 0, 1, torch::kFloat32);
  finish_gradients(model, groups);
}

}  // namespace
}  // namespace anabranch::test
