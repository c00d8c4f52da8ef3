// The layer on one GPU, forward and backward with its router, beside the same MoE written with
// torch._grouped_mm and index operations, in the same rounds; with routing that is nearly even and with
// skewed routing, with many tokens and with few; launched one by one and as a CUDA graph; and where the
// layer's time goes, on the GPU and on the host. layer.py measures it as Python calls it.
#include <ATen/cuda/CUDAContextLight.h>
#include <anabranch/anabranch.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numbers>
#include <optional>
#include <stdexcept>

#include "gpu/measure.h"
#include "gpu/shape.h"
#include "gpu/trace.h"

namespace anabranch::benchmark {
namespace {

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

/// The shapes, or those with one of `names`, the skewed ones among them, and those of few tokens, where the host is
/// what a step waits for.
std::vector<Shape> cases(const std::vector<std::string>& names) {
  std::vector<Shape> all(std::begin(kShapes), std::end(kShapes));
  for (const Shape& shape : kShapes) {
    if (shape.glu) all.push_back(shape.with_skew(1));
  }
  for (const Shape& shape : {kShapes[0], kShapes[5], kShapes[6]}) {
    for (const int64_t tokens : {64, 512, 4096}) {
      all.push_back(shape.with_tokens(tokens));
    }
  }
  const auto is_wanted = [&](const Shape& shape) {
    return names.empty() || std::find(names.begin(), names.end(), shape.name) != names.end();
  };
  std::erase_if(all, [&](const Shape& shape) { return !is_wanted(shape); });
  if (all.empty()) {
    throw std::invalid_argument("--shapes: no shape has one of these names");
  }
  return all;
}

/// Has the router prefer experts by Zipf's law: a column of x that is 1 meets the logarithms of their shares,
/// and the other logits get the deviation of the Gumbel distribution, with which the best of them would
/// follow the shares exactly. (Their distribution is nearly normal: top experts are a little more popular.)
void skew_router(torch::Tensor weight, torch::Tensor x, const Shape& shape) {
  if (shape.skew == 0) return;
  const torch::NoGradGuard no_grad;
  const double deviation = std::numbers::pi / std::sqrt(6.0);
  weight.mul_(deviation / (weight.std().item<double>() * std::sqrt(shape.hidden)));
  const auto shares = zipf_shares(shape.experts, shape.skew, 1);
  weight.select(1, 0).copy_(torch::tensor(shares, torch::kFloat64).log());
  x.select(1, 0).fill_(1);
}

/// Whether nothing of a step waits for counts of rows.
bool can_be_recorded(const std::string& engine) {
  const auto engines = grouped_gemm_engines(torch::kCUDA);
  const bool reads_counts = std::count(engines.begin(), engines.end(), "hopper") > 0;
  return reads_counts && (engine == "auto" || engine == "deterministic" || engine == "hopper");
}

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

MoELayer layer_of(const Shape& shape, const std::string& engine) {
  MoEOptions options;
  options.hidden_size = shape.hidden;
  options.expert_hidden_size = shape.inner;
  options.num_experts = shape.experts;
  options.top_k = shape.top_k;
  options.glu = shape.glu;
  options.activation = shape.glu ? Activation::kSilu : Activation::kGeluTanh;
  options.dtype = torch::kBFloat16;
  options.device = torch::kCUDA;
  options.engine = engine;
  return MoELayer(options);
}

void measure(const Shape& shape, const Arguments& arguments, Json& results) {
  torch::manual_seed(1);
  MoELayer layer = layer_of(shape, arguments.engine);
  const auto parameters = layer->named_parameters();
  const auto bf16 = torch::dtype(torch::kBFloat16).device(torch::kCUDA);
  const auto x = torch::randn({shape.tokens, shape.hidden}, bf16);
  const auto dy = torch::randn({shape.tokens, shape.hidden}, bf16);
  skew_router(parameters["router.weight"], x, shape);
  x.requires_grad_();
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
  const double imbalanced = imbalance(layer->forward(x).expert_load);
  ours();  // engines are chosen, by trials that take memory of their own
  const double our_peak = peak_gib(ours);
  const double plain_peak = peak_gib(plain);
  std::vector<std::function<void()>> ways = {ours, plain, forward};
  std::optional<Replayed> replayed;
  if (can_be_recorded(arguments.engine)) {
    replayed.emplace(ours);
    ways.emplace_back([&] { (*replayed)(); });
  }
  constexpr int kRounds = 15;
  auto times = gpu_milliseconds(ways, kRounds);
  times.resize(4, std::nan(""));  // no graph
  const double issue = host_microseconds(ours);
  const Trace traced = trace(ours);
  const double tflop = shape.flops() / 1e9;
  std::printf(
      "%s, %lld tokens, zipf %g (fullest over mean %.1f): %.3f ms (forward %.3f, issued in %.3f, "
      "graph "
      "%.3f) %.0f TFLOP/s %.2f GiB | torch._grouped_mm %.3f ms %.0f TFLOP/s %.2f GiB | %.2f times "
      "the "
      "speed\n",
      shape.name, static_cast<long long>(shape.tokens), shape.skew, imbalanced, times[0], times[2],
      issue / 1e3, times[3], tflop / times[0], our_peak, times[1], tflop / times[1], plain_peak,
      times[1] / times[0]);
  print(traced);
  auto record = Json{{"shape", shape.name},
                     {"tokens", shape.tokens},
                     {"zipf", shape.skew},
                     {"imbalance", imbalanced},
                     {"engine", arguments.engine},
                     {"ms", times[0]},
                     {"forward_ms", times[2]},
                     {"issue_ms", issue / 1e3},
                     {"graph_ms", replayed ? Json(times[3]) : Json()},
                     {"launches", traced.launches},
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
  for (const Shape& shape : cases(arguments.shapes)) {
    measure(shape, arguments, results);
    at::cuda::clearCublasWorkspaces();  // of the graph's stream: they are in no other shape's peak
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
                        {"json", "commit", "quick", "engine", "shapes"}},
                       run);
}
