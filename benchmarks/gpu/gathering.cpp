// Products of a layer's forward and backward that read rows by their index beside the same products of rows that lie
// in order, and beside the copy that would put them so: bf16, with --engine (default: hopper).
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/tensor.h>
#include <anabranch/grouped_gemm.h>

#include <cstdio>
#include <random>

#include "gpu/measure.h"
#include "gpu/shape.h"
#include "kernels/rows.h"

namespace anabranch::benchmark {
namespace {

constexpr Shape kShapes[] = {
    {"Mixtral", 16384, 4096, 14336, 8, 2, true},   {"OLMoE", 32768, 2048, 1024, 64, 8, true},
    {"Qwen3-30B", 32768, 2048, 768, 128, 8, true}, {"fine", 24576, 1536, 256, 128, 8, true},
    {"OLMoE", 4096, 2048, 1024, 64, 8, true},
};
constexpr double kSkews[] = {0, 0.8};

/// Of each expert's rows the tokens, ascending, spread over all.
at::Tensor tokens_of_rows(const Shape& shape, const std::vector<int64_t>& counts) {
  std::mt19937_64 random(1);
  std::vector<int64_t> tokens;
  for (const int64_t count : counts) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t begin = i * shape.tokens / count;
      const int64_t end = std::max(begin + 1, (i + 1) * shape.tokens / count);
      tokens.push_back(begin + static_cast<int64_t>(random() % static_cast<uint64_t>(end - begin)));
    }
  }
  return at::tensor(tokens, at::kLong).to(at::kCUDA);
}

/// What the products of a gated layer read and write; x and dy [T, h], their copies [P, h].
struct Tensors {
  Tensors(const Shape& shape, const ExpertCounts& counts)
      : index(tokens_of_rows(shape, counts.on_host())) {
    const auto options = at::TensorOptions(at::kCUDA).dtype(at::kBFloat16);
    const int64_t rows = index.size(0);
    x = at::randn({shape.tokens, shape.hidden}, options);
    dy = at::randn_like(x);
    up_weight = at::randn({shape.experts, 2 * shape.inner, shape.hidden}, options).mul_(0.02);
    down_weight = at::randn({shape.experts, shape.hidden, shape.inner}, options).mul_(0.02);
    hidden = at::randn({rows, 2 * shape.inner}, options);
    routing_weights = at::rand({rows}, options.dtype(at::kFloat));
    gradient = {at::empty_like(hidden), at::empty_like(routing_weights),
                at::empty({rows, shape.inner}, options)};
    activated = at::randn({rows, shape.inner}, options);
    dup = at::empty_like(up_weight);
    ddown = at::empty_like(down_weight);
  }

  at::Tensor index, x, dy, up_weight, down_weight, hidden, routing_weights, activated, dup, ddown;
  GroupedGemmEngine::ActivatedGradient gradient;
};

using Product = std::function<void(const ProductRows& x, const ProductRows& dy)>;

void measure(const Shape& shape, GroupedGemmEngine& engine, Json& results) {
  const ExpertCounts counts(zipf_counts(shape.tokens * shape.top_k, shape.experts, shape.skew));
  Tensors t(shape, counts);
  HiddenActivation activation;
  activation.activation = Activation::kSilu;
  activation.glu = true;
  const std::pair<const char*, Product> products[] = {
      {"up, activation",
       [&](const auto& x, const auto&) {
         engine.forward_activated(x, t.up_weight, counts, activation, t.hidden);
       }},
      {"down dX, activation",
       [&](const auto&, const auto& dy) {
         engine.dgrad_activated(dy, t.down_weight, counts, activation, t.hidden, t.routing_weights,
                                t.gradient);
       }},
      {"down dW",
       [&](const auto&, const auto& dy) { engine.wgrad(dy, t.activated, counts, t.ddown); }},
      {"up dW", [&](const auto& x, const auto&) { engine.wgrad(t.hidden, x, counts, t.dup); }},
  };
  const auto& rows = RowKernels::cuda();
  const auto copy = [&] { return rows.gather_rows(t.x, t.index); };
  const ProductRows x_copied = copy(), dy_copied = rows.gather_rows(t.dy, t.index);
  const ProductRows x_indexed(t.x, t.index), dy_indexed(t.dy, t.index);
  for (const auto& [name, product] : products) {
    const auto times =
        gpu_milliseconds({[&, &run = product] { run(x_copied, dy_copied); },
                          [&, &run = product] { run(x_indexed, dy_indexed); }, [&] { copy(); }});
    std::printf(
        "%-10s %6ld tokens, zipf %.1f, %-20s of a copy %.3f ms, by index %.3f ms (%.2f), the copy "
        "%.3f ms\n",
        shape.name, static_cast<long>(shape.tokens), shape.skew, name, times[0], times[1],
        times[1] / times[0], times[2]);
    results.push_back(Json{{"shape", shape.name},
                           {"tokens", shape.tokens},
                           {"skew", shape.skew},
                           {"product", name},
                           {"engine", engine.name()},
                           {"of_copy_ms", times[0]},
                           {"by_index_ms", times[1]},
                           {"copy_ms", times[2]}});
  }
}

void run(const Arguments& arguments) {
  const auto engine = make_grouped_gemm_engine(at::kCUDA, arguments.engine);
  Json results = Json::array();
  for (const Shape& shape : kShapes) {
    for (const double skew : kSkews) measure(shape.with_skew(skew), *engine, results);
    if (arguments.quick) break;
  }
  write_gpu_results(arguments, results);
}

}  // namespace
}  // namespace anabranch::benchmark

int main(int argc, char** argv) {
  using namespace anabranch::benchmark;
  Arguments defaults;
  defaults.engine = "hopper";
  return run_benchmark(argc, argv,
                       {"Rows read by their index in a grouped GEMM, beside a copy of them, bf16",
                        {"json", "commit", "quick", "engine"},
                        defaults},
                       run);
}
