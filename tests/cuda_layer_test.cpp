// What the host does while a layer runs on a GPU, from the profiler's trace of CUDA's calls.
#include <gtest/gtest.h>
#include <torch/csrc/autograd/profiler_kineto.h>
#include <torch/cuda.h>

#include <algorithm>
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

/// What the profiler has seen while `work` ran: calls of CUDA's by all threads, and what a GPU did.
struct Event {
  std::string name;
  uint64_t begin;  ///< ns
  uint64_t end;
  uint64_t correlation;  ///< the same of a call and of what the GPU does for it
};
struct Trace {
  std::vector<Event> calls;
  std::vector<Event> on_gpu;

  Calls counted() const {
    Calls counts;
    for (const Event& call : calls) ++counts[call.name];
    return counts;
  }
};

Trace trace(const std::function<void()>& work) {
  const torch::profiler::impl::ProfilerConfig config(torch::profiler::impl::ProfilerState::KINETO);
  const std::set<ActivityType> activities = {ActivityType::CPU, ActivityType::CUDA};
  torch::autograd::profiler::prepareProfiler(config, activities);
  torch::autograd::profiler::enableProfiler(config, activities);
  {
    RECORD_USER_SCOPE(kRange);
    work();
  }
  torch::cuda::synchronize();  // what the GPU has not done yet is not seen
  const auto result = torch::autograd::profiler::disableProfiler();
  uint64_t begin = 0;
  uint64_t end = 0;
  for (const auto& event : result->events()) {
    if (event.name() == kRange && event.deviceType() == c10::DeviceType::CPU) {
      begin = event.startNs();
      end = event.endNs();
    }
  }
  Trace traced;
  for (const auto& event : result->events()) {
    const Event seen{event.name(), event.startNs(), event.endNs(), event.correlationId()};
    if (event.deviceType() == c10::DeviceType::CUDA) {
      traced.on_gpu.push_back(seen);
    } else if (seen.name.starts_with("cu") && seen.begin >= begin && seen.begin <= end) {
      traced.calls.push_back(seen);
    }
  }
  return traced;
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
    const Calls calls = trace(step).counted();
    for (const auto& [name, count] : calls) {
      if (world()->rank() == 0) {
        std::cout << std::setw(6) << count << "  " << name << std::endl;
      }
    }
    EXPECT_GT(calls.size(), 0U) << "the profiler has seen no call";
    EXPECT_EQ(waits(calls), alone ? 0 : 1);
  }
}

// Nor between ranks that map each other's memory, where there is room for what comes.
TEST(CudaLayer, TheHostNeverWaitsWhereThereIsRoom) {
  const auto engines = grouped_gemm_engines(device());
  if (!world()->reads_counts_on(device()) ||
      std::count(engines.begin(), engines.end(), "hopper") == 0) {
    GTEST_SKIP() << "counts are the host's here";
  }
  Random random(test_seed());
  auto layer_case = large_case(random);
  layer_case.options.receive_capacity = world()->size();
  auto layer = make_layer(layer_case, world());
  const auto x = shard(layer_case.x, layer_case.counts, world()->rank()).requires_grad_();
  const auto doutput = shard(layer_case.doutput, layer_case.counts, world()->rank());
  const auto step = [&] { layer->forward(x).output.backward(doutput); };
  for (int i = 0; i < 4; ++i) {
    step();
  }
  world()->barrier();
  EXPECT_EQ(waits(trace(step).counted()), 0);
  check();
}

/// What the host has given the GPU when it begins to wait, and how long the GPU then has nothing to do, in
/// µs: between the last that it was given before the wait and the first after it.
struct Wait {
  int kernels_behind_counts = 0;
  double idle = 0;
};

Wait the_wait(const Trace& traced) {
  const auto is_wait = [](const Event& call) {
    return call.name.find("Synchronize") != std::string::npos;
  };
  const auto wait = std::find_if(traced.calls.begin(), traced.calls.end(), is_wait);
  Wait found;
  if (wait == traced.calls.end()) {
    ADD_FAILURE() << "the host has not waited";
    return found;
  }
  uint64_t copied = 0;
  std::set<uint64_t> before;
  for (const Event& call : traced.calls) {
    if (call.begin < wait->begin) {
      before.insert(call.correlation);
      if (call.name.starts_with("cudaMemcpy")) copied = std::max(copied, call.begin);
    }
  }
  for (const Event& call : traced.calls) {
    found.kernels_behind_counts += call.name.find("LaunchKernel") != std::string::npos &&
                                           call.begin > copied && call.begin < wait->begin
                                       ? 1
                                       : 0;
  }
  uint64_t busy_until = 0;
  uint64_t resumed = std::numeric_limits<uint64_t>::max();
  for (const Event& work : traced.on_gpu) {
    if (before.count(work.correlation) > 0) {
      busy_until = std::max(busy_until, work.end);
    } else {
      resumed = std::min(resumed, work.begin);
    }
  }
  found.idle = resumed > busy_until ? 1e-3 * static_cast<double>(resumed - busy_until) : 0;
  return found;
}

// Between ranks the host learns its counts while the GPU has other work: the losses, and a shared expert
// where there is one.
TEST(CudaLayer, TheWaitForCountsIsHidden) {
  if (world()->size() == 1) {
    GTEST_SKIP() << "a rank alone does not wait for counts, or has nobody to wait with";
  }
  const bool own_gpu = static_cast<int64_t>(torch::cuda::device_count()) >= world()->size();
  for (const int64_t shared : {0, 512}) {
    MoEOptions options;
    options.hidden_size = 1024;
    options.expert_hidden_size = 512;
    options.num_experts = 16;
    options.top_k = 4;
    options.glu = true;
    options.activation = Activation::kSilu;
    options.shared_expert_hidden_size = shared;
    options.dtype = torch::kBFloat16;
    options.device = device();
    MoELayer layer(options, world());
    const auto x = torch::randn({4096, 1024}, torch::dtype(torch::kBFloat16).device(device()));
    const auto step = [&] { return layer->forward(x).output; };
    for (int i = 0; i < 4; ++i) {
      step().sum().backward();
    }
    std::vector<double> idle;
    for (int i = 0; i < 9; ++i) {
      world()->barrier();
      const Wait wait = the_wait(trace([&] { step(); }));
      EXPECT_GE(wait.kernels_behind_counts, shared > 0 ? 6 : 4);
      idle.push_back(wait.idle);
    }
    std::sort(idle.begin(), idle.end());
    std::cout << "rank " << world()->rank() << ", shared expert of " << shared
              << ": the GPU had nothing to do for " << idle[4] << " us, " << idle.front() << " to "
              << idle.back() << std::endl;
    if (own_gpu) {
      EXPECT_LE(idle[4], 20.0);
    }
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
  EXPECT_EQ(waits(trace([&] { ones.sum(); }).counted()), 0);
  EXPECT_GE(waits(trace([&] { ones.sum().item<float>(); }).counted()), 1);
}

}  // namespace
}  // namespace anabranch::test
