// The layer on one GPU, forward and backward with its router, beside the same MoE written with
// torch._grouped_mm and index operations, in the same rounds; and where the layer's time goes.
#include <anabranch/anabranch.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <torch/csrc/autograd/profiler_kineto.h>
#include <torch/torch.h>

#include <cstdio>
#include <map>

#include "gpu/measure.h"

namespace anabranch::benchmark {
namespace {

struct Shape {
  const char* name;
  int64_t tokens;
  int64_t hidden;
  int64_t inner;
  int64_t experts;
  int64_t top_k;
  bool glu;

  /// Exact, forward and backward.
  double flops() const {
    return 3.0 * 2.0 * static_cast<double>(tokens * top_k * hidden * inner) * (glu ? 3 : 2);
  }
};

constexpr Shape kShapes[] = {
    {"seed 16x1024 h512 k3", 16384, 512, 2048, 8, 3, false},
    {"seed 64x1024 h512 k8", 65536, 512, 2048, 8, 8, false},
    {"seed 32x512 h512 k4", 16384, 512, 2048, 8, 4, false},
    {"seed 64x1024 h1024 k3", 65536, 1024, 4096, 8, 3, false},
    {"Mixtral", 16384, 4096, 14336, 8, 2, true},
    {"OLMoE", 32768, 2048, 1024, 64, 8, true},
    {"Qwen3-30B", 32768, 2048, 768, 128, 8, true},
    {"fine", 24576, 1536, 256, 128, 8, true},
};

/// What a user would write without this library, over the layer's own parameters.
torch::Tensor plain_moe(const torch::Tensor& x,
                        const torch::OrderedDict<std::string, torch::Tensor>& p,
                        const Shape& shape) {
  const auto logits = torch::mm(x, p["router.weight"].to(x.scalar_type()).t());
  auto [weights, ids] = torch::softmax(logits.to(torch::kFloat), 1).topk(shape.top_k, 1);
  weights = weights / weights.sum(1, true);
  const auto flat = ids.flatten();
  const auto order = flat.argsort(/*stable=*/true);
  const auto token = order.div(shape.top_k, "floor");
  const auto ends = torch::bincount(flat, {}, shape.experts).cumsum(0).to(torch::kInt);
  auto hidden =
      at::_grouped_mm(x.index_select(0, token), p["experts.up_weight"].transpose(1, 2), ends);
  if (shape.glu) {
    const auto halves = hidden.chunk(2, 1);
    hidden = torch::silu(halves[0]) * halves[1];
  } else {
    hidden = torch::gelu(hidden, "tanh");
  }
  const auto out = at::_grouped_mm(hidden, p["experts.down_weight"].transpose(1, 2), ends);
  const auto weight = weights.flatten().index_select(0, order).to(x.scalar_type()).unsqueeze(1);
  return torch::zeros_like(x).index_add(0, token, out * weight);
}

double peak_gib(const std::function<void()>& step) {
  c10::cuda::CUDACachingAllocator::resetPeakStats(0);
  step();
  return static_cast<double>(
             c10::cuda::CUDACachingAllocator::getDeviceStats(0).allocated_bytes[0].peak) /
         (1 << 30);
}

/// Microseconds of each kernel in one step, and the time from the first one's start to the last one's
/// end.
struct Trace {
  std::map<std::string, double> kernels;
  double busy = 0;
  double span = 0;
};

Trace trace(const std::function<void()>& step) {
  namespace profiler = torch::autograd::profiler;
  const profiler::ProfilerConfig config(torch::profiler::impl::ProfilerState::KINETO);
  const std::set activities = {torch::profiler::impl::ActivityType::CUDA};
  profiler::prepareProfiler(config, activities);
  profiler::enableProfiler(config, activities);
  step();
  torch::cuda::synchronize();
  const auto result = profiler::disableProfiler();
  Trace trace;
  uint64_t first = std::numeric_limits<uint64_t>::max();
  uint64_t last = 0;
  for (const auto& event : result->events()) {
    if (event.deviceType() != c10::DeviceType::CUDA) {
      continue;
    }
    const double us = static_cast<double>(event.durationNs()) / 1e3;
    trace.kernels[event.name()] += us;
    trace.busy += us;
    first = std::min(first, event.startNs());
    last = std::max(last, event.startNs() + event.durationNs());
  }
  trace.span = last > first ? static_cast<double>(last - first) / 1e3 : 0;
  return trace;
}

void print(const Trace& trace) {
  std::vector<std::pair<double, std::string>> sorted;
  for (const auto& [name, us] : trace.kernels) {
    sorted.emplace_back(us, name);
  }
  std::sort(sorted.rbegin(), sorted.rend());
  std::printf("  %.0f us from the first kernel to the last, %.0f us of them busy\n", trace.span,
              trace.busy);
  for (const auto& [us, name] : sorted) {
    if (us > 0.004 * trace.busy) {
      std::printf("  %9.1f us  %.150s\n", us, name.c_str());
    }
  }
}

void measure(const Shape& shape, const Arguments& arguments, Json& results) {
  torch::manual_seed(1);
  MoEOptions options;
  options.hidden_size = shape.hidden;
  options.expert_hidden_size = shape.inner;
  options.num_experts = shape.experts;
  options.top_k = shape.top_k;
  options.glu = shape.glu;
  options.activation = shape.glu ? Activation::kSilu : Activation::kGeluTanh;
  options.dtype = torch::kBFloat16;
  options.device = torch::kCUDA;
  options.engine = arguments.engine;
  MoELayer layer(options);
  const auto parameters = layer->named_parameters();
  const auto bf16 = torch::dtype(torch::kBFloat16).device(torch::kCUDA);
  const auto x = torch::randn({shape.tokens, shape.hidden}, bf16).requires_grad_();
  const auto dy = torch::randn({shape.tokens, shape.hidden}, bf16);
  const auto clear = [&] {
    layer->zero_grad();
    x.mutable_grad().reset();
  };
  const auto forward = [&] { layer->forward(x); };
  const auto ours = [&] {
    layer->forward(x).output.backward(dy);
    clear();
  };
  const auto plain = [&] {
    plain_moe(x, parameters, shape).backward(dy);
    clear();
  };
  constexpr int kRounds = 15;
  const auto times = gpu_milliseconds({ours, plain, forward}, kRounds);
  const double our_peak = peak_gib(ours);
  const double plain_peak = peak_gib(plain);
  const double tflop = shape.flops() / 1e9;
  std::printf(
      "%-22s %7.2f ms (forward %.2f) %4.0f TFLOP/s %5.2f GiB | torch._grouped_mm %7.2f ms %4.0f "
      "TFLOP/s %5.2f GiB | %.2f times the speed\n",
      shape.name, times[0], times[2], tflop / times[0], our_peak, times[1], tflop / times[1],
      plain_peak, times[1] / times[0]);
  const Trace traced = trace(ours);
  print(traced);
  auto record = Json{{"shape", shape.name},
                     {"engine", arguments.engine},
                     {"ms", times[0]},
                     {"forward_ms", times[2]},
                     {"TFLOP_per_s", tflop / times[0]},
                     {"peak_GiB", our_peak},
                     {"grouped_mm_ms", times[1]},
                     {"grouped_mm_TFLOP_per_s", tflop / times[1]},
                     {"grouped_mm_peak_GiB", plain_peak},
                     {"speedup", times[1] / times[0]},
                     {"busy_us", traced.busy},
                     {"span_us", traced.span}};
  for (const auto& [name, us] : traced.kernels) {
    record["us of " + name] = us;
  }
  results.push_back(record);
}

void run(const Arguments& arguments) {
  Json results = Json::array();
  for (const Shape& shape : kShapes) {
    measure(shape, arguments, results);
    c10::cuda::CUDACachingAllocator::emptyCache();
    if (arguments.quick) {
      break;
    }
  }
  std::printf("%s\n", make_grouped_gemm_engine(torch::kCUDA, arguments.engine)->explain().c_str());
  write_gpu_results(arguments, results);
}

}  // namespace
}  // namespace anabranch::benchmark

int main(int argc, char** argv) {
  using namespace anabranch::benchmark;
  return run_benchmark(argc, argv,
                       {"MoE layer on a GPU beside torch._grouped_mm and index operations, bf16",
                        {"json", "commit", "quick", "engine"}},
                       run);
}
