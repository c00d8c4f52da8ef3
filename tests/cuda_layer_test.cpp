// What the host does while a layer runs on a GPU, from the profiler's trace of CUDA's calls.
#include <gtest/gtest.h>
#include <torch/csrc/autograd/profiler_kineto.h>
#include <torch/cuda.h>

#include <iomanip>
#include <limits>
#include <set>

#include "support/devices.h"
#include "support/layer_case.h"
#include "support/thrown.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

using torch::profiler::impl::ActivityType;

/// How often each call of CUDA's was made, by name.
using Calls = std::map<std::string, int>;

constexpr const char* kRange = "the traced step";

/// The CUDA calls of all threads while `work` runs.
Calls trace(const std::function<void()>& work) {
  const torch::profiler::impl::ProfilerConfig config(torch::profiler::impl::ProfilerState::KINETO);
  const std::set<ActivityType> activities = {ActivityType::CPU, ActivityType::CUDA};
  torch::autograd::profiler::prepareProfiler(config, activities);
  torch::autograd::profiler::enableProfiler(config, activities);
  {
    RECORD_USER_SCOPE(kRange);
    work();
  }
  const auto result = torch::autograd::profiler::disableProfiler();
  uint64_t begin = 0;
  uint64_t end = 0;
  for (const auto& event : result->events()) {
    if (event.name() == kRange && event.deviceType() == c10::DeviceType::CPU) {
      begin = event.startNs();
      end = event.endNs();
    }
  }
  Calls calls;
  for (const auto& event : result->events()) {
    const bool of_cuda = event.name().starts_with("cuda") || event.name().starts_with("cu");
    if (of_cuda && event.deviceType() == c10::DeviceType::CPU && event.startNs() >= begin &&
        event.startNs() <= end) {
      ++calls[event.name()];
    }
  }
  return calls;
}

/// Calls in which the host waits for the GPU, always or as a side effect.
int waits(const Calls& calls) {
  int found = 0;
  for (const auto& [name, count] : calls) {
    for (const char* blocking : {"Synchronize", "Malloc", "Free", "HostAlloc", "HostRegister"}) {
      found += name.find(blocking) != std::string::npos ? count : 0;
    }
    found += name == "cudaMemcpy" || name == "cudaMemset" ? count : 0;
  }
  return found;
}

LayerCase large_case(Random& random) {
  MoEOptions options;
  options.hidden_size = 64;
  options.expert_hidden_size = 96;
  options.num_experts = 8;
  options.top_k = 2;
  options.glu = options.bias = true;
  options.activation = Activation::kSilu;
  options.shared_expert_hidden_size = 32;
  options.dtype = torch::kBFloat16;
  return draw_layer_case(random, world()->size(), options, 300, Skew::kUniform, Split::kEven,
                         false);
}

// Nothing is waited for where the products read their counts themselves and no other rank has any.
TEST(CudaLayer, TheHostWaitsOnceAStepOrNever) {
  const auto engines = grouped_gemm_engines(device());
  const bool alone =
      world()->size() == 1 && std::count(engines.begin(), engines.end(), "hopper") > 0;
  Random random(test_seed());
  for (const bool recompute : {false, true}) {
    auto layer_case = large_case(random);
    layer_case.options.recompute = recompute;
    auto layer = make_layer(layer_case, world());
    const auto x = shard(layer_case.x, layer_case.counts, world()->rank()).requires_grad_();
    const auto doutput = shard(layer_case.doutput, layer_case.counts, world()->rank());
    const auto step = [&] { layer->forward(x).output.backward(doutput); };
    for (int i = 0; i < 4; ++i) {
      step();  // memory is found, engines are chosen, ranks connected
    }
    world()->barrier();
    const Calls calls = trace(step);
    for (const auto& [name, count] : calls) {
      if (world()->rank() == 0) {
        std::cout << std::setw(6) << count << "  " << name << std::endl;
      }
    }
    EXPECT_GT(calls.size(), 0U) << "the profiler has seen no call";
    EXPECT_EQ(waits(calls), alone ? 0 : 1);
  }
}

// A routing that is refused on a GPU that nobody waits for: NaN at once, the error at the next call that
// may know, and then all is well again.
TEST(CudaLayer, RefusalsOfARankAloneAreLate) {
  if (world()->size() > 1) {
    GTEST_SKIP() << "several ranks wait for counts";
  }
  Random random(test_seed());
  auto layer_case = large_case(random);
  auto layer = make_layer(layer_case, world());
  const auto x = layer_case.x.to(device());
  const auto expect_late = [&](const auto& bad_step, const auto& hear, const char* text) {
    const auto output = bad_step();
    EXPECT_INPUT_ERROR(hear(), text);
    EXPECT_TRUE(output[7].isnan().all().template item<bool>());
    EXPECT_EQ(output.isnan().any(1).sum().template item<int64_t>(), 1);
    EXPECT_FALSE(layer->forward(x).output.isnan().any().template item<bool>());
    EXPECT_NO_THROW(check());
  };
  const auto nan_gate = [&] {
    auto bad = x.clone();
    bad[7][3] = std::numeric_limits<float>::quiet_NaN();
    return layer->forward(bad).output;
  };
  expect_late(
      nan_gate, [] { check(); }, "token 7");
  expect_late(
      nan_gate,
      [&] {
        torch::cuda::synchronize();
        layer->forward(x);
      },
      "token 7");
  for (const int64_t id : {int64_t{8}, int64_t{-1}}) {
    Routing routing;
    routing.expert_ids = torch::tensor({0, 1}, torch::kInt64).repeat({x.size(0), 1}).to(device());
    routing.weights = torch::ones({x.size(0), 2}).to(device());
    routing.expert_ids[7][1] = id;
    expect_late([&] { return layer->forward(x, routing).output; }, [] { check(); }, "token 7");
  }
}

// The trace does find what it is to find.
TEST(CudaLayer, ATraceShowsWaits) {
  const auto ones = torch::ones({10}, device());
  EXPECT_EQ(waits(trace([&] { ones.sum(); })), 0);
  EXPECT_GE(waits(trace([&] { ones.sum().item<float>(); })), 1);
}

}  // namespace
}  // namespace anabranch::test
