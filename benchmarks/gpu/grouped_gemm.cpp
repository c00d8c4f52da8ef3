// Grouped GEMM engines on a GPU beside one dense GEMM of the same FLOPs and torch._grouped_mm: those
// that auto chooses from; with --engine all also those that are here to be compared with, and what
// building the topology of block_sparse costs; with --engine NAME that one alone.
#include <anabranch/grouped_gemm.h>
#include <ATen/ops/_grouped_mm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/tensor.h>

#include <algorithm>
#include <cstdio>
#include <numeric>

#include "baselines/baselines.h"
#include "baselines/block_sparse/topology.h"
#include "gpu/measure.h"

namespace anabranch::benchmark {
namespace {

struct Shape {
  const char* name;
  int64_t k;
  int64_t n;
  int64_t experts;
  int64_t rows;
};

constexpr Shape kShapes[] = {
    {"Mixtral up", 4096, 28672, 8, 16384},    {"Qwen3 up", 2048, 1536, 128, 262144},
    {"Qwen3 down", 768, 2048, 128, 262144},   {"OLMoE up", 2048, 2048, 64, 262144},
    {"DeepSeek-V3 up", 7168, 4096, 4, 16384}, {"seed", 512, 2048, 8, 524088},
    {"fine up", 1536, 512, 128, 196608},      {"small", 1024, 1024, 64, 8192},
};

struct Split {
  std::string name;
  std::vector<int64_t> counts;
};

constexpr double kZipf = 0.8;

/// The article's own uneven split where the shape is the article's, else a zipf one; and even counts.
std::vector<Split> splits_of(const Shape& shape, bool quick) {
  std::vector<Split> splits;
  if (!quick) {
    splits.push_back({"uni", zipf_counts(shape.rows, shape.experts, 0)});
  }
  if (shape.name == std::string("seed")) {
    splits.push_back({"seed", {130759, 78925, 35368, 90425, 1433, 120455, 64589, 2134}});
  } else {
    splits.push_back({"zipf", zipf_counts(shape.rows, shape.experts, kZipf)});
  }
  return splits;
}

enum class Operation { kForward, kDgrad, kWgrad };
constexpr const char* kNames[] = {"fwd", "dX", "dW"};

struct Tensors {
  at::Tensor x;
  at::Tensor dy;
  at::Tensor weight;
  at::Tensor y;
  at::Tensor dx;
  at::Tensor dweight;
  at::Tensor ends;  ///< int32, as torch._grouped_mm wants them

  Tensors(const Shape& shape, const std::vector<int64_t>& counts) {
    const auto options = at::TensorOptions(at::kCUDA).dtype(at::kBFloat16);
    x = at::randn({shape.rows, shape.k}, options);
    dy = at::randn({shape.rows, shape.n}, options);
    weight = at::randn({shape.experts, shape.n, shape.k}, options);
    y = at::empty({shape.rows, shape.n}, options);
    dx = at::empty({shape.rows, shape.k}, options);
    dweight = at::empty_like(weight);
    std::vector<int64_t> running(counts.size());
    std::partial_sum(counts.begin(), counts.end(), running.begin());
    ends = at::tensor(running, at::kInt).to(at::kCUDA);
  }
};

void run_engine(GroupedGemmEngine& engine, Tensors& t, const std::vector<int64_t>& counts,
                Operation operation) {
  switch (operation) {
    case Operation::kForward:
      return engine.forward(t.x, t.weight, counts, t.y);
    case Operation::kDgrad:
      return engine.dgrad(t.dy, t.weight, counts, t.dx);
    case Operation::kWgrad:
      return engine.wgrad(t.dy, t.x, counts, t.dweight);
  }
}

at::Tensor run_torch(const Tensors& t, Operation operation) {
  switch (operation) {
    case Operation::kForward:
      return at::_grouped_mm(t.x, t.weight.transpose(1, 2), t.ends);
    case Operation::kDgrad:
      return at::_grouped_mm(t.dy, t.weight, t.ends);
    case Operation::kWgrad:
      return at::_grouped_mm(t.dy.t(), t.x, t.ends);
  }
  return {};
}

void run_dense(Tensors& t, Operation operation) {
  const at::Tensor weight = t.weight[0];
  at::Tensor dweight = t.dweight[0];
  switch (operation) {
    case Operation::kForward:
      at::mm_out(t.y, t.x, weight.t());
      return;
    case Operation::kDgrad:
      at::mm_out(t.dx, t.dy, weight);
      return;
    case Operation::kWgrad:
      at::mm_out(dweight, t.dy.t(), t.x);
      return;
  }
}

std::vector<std::string> engine_names(const Arguments& arguments) {
  if (arguments.engine != "auto" && arguments.engine != "all") {
    return {arguments.engine};
  }
  auto names = grouped_gemm_engines(at::kCUDA);  // the library's, then the baselines
  const auto library_end = names.end() - std::ssize(baseline_engine_names());
  const auto baselines = std::next(names.insert(library_end, "auto"));
  if (arguments.engine == "auto") {
    names.erase(baselines, names.end());
  }
  return names;
}

/// What block_sparse does before each product.
void measure_topology(const Shape& shape, const Split& split, Json& results) {
  const double ms = gpu_milliseconds(
      [&] { block_sparse::build_topology(split.counts, shape.n, 128, torch::Device(at::kCUDA)); });
  std::printf("%-15s %-4s topology of block_sparse %.4f ms\n", shape.name, split.name.c_str(), ms);
  results.push_back(Json{{"shape", shape.name},
                         {"split", split.name},
                         {"operation", "topology"},
                         {"engine", "block_sparse"},
                         {"ms", ms}});
}

/// Speed of one over that of another, in more rounds and without third parties: engines are within some
/// per cent of each other, and the best of many is one that had luck.
double duel(const std::function<void()>& one, const std::function<void()>& other) {
  constexpr int kRounds = 41;
  const auto times = gpu_milliseconds({one, other}, kRounds);
  return times[1] / times[0];
}

/// All ways take turns, so that the GPU's clock is the same for each.
void measure(const Shape& shape, const Split& split, const std::vector<std::string>& engines,
             Json& results) {
  Tensors tensors(shape, split.counts);
  const double flops =
      2.0 * static_cast<double>(shape.rows * shape.n) * static_cast<double>(shape.k);
  for (const auto operation : {Operation::kForward, Operation::kDgrad, Operation::kWgrad}) {
    constexpr std::ptrdiff_t kFirstEngine = 2;
    std::vector<std::string> names = {"dense", "torch"};
    std::vector<int64_t> padding = {0, 0};
    std::vector<std::function<void()>> calls = {[&] { run_dense(tensors, operation); },
                                                [&] { run_torch(tensors, operation); }};
    for (const auto& name : engines) {
      const auto engine = make_grouped_gemm_engine(at::kCUDA, name);
      names.push_back(name);
      padding.push_back(engine->padding_rows(split.counts));
      calls.emplace_back([&, engine] { run_engine(*engine, tensors, split.counts, operation); });
    }
    const auto times = gpu_milliseconds(calls);
    std::printf("%-15s %-4s %-3s", shape.name, split.name.c_str(),
                kNames[static_cast<int>(operation)]);
    for (size_t i = 0; i < names.size(); ++i) {
      std::printf(" %s %.0f (%.2f)", names[i].c_str(), flops / times[i] / 1e9, times[0] / times[i]);
      results.push_back(Json{{"shape", shape.name},
                             {"split", split.name},
                             {"operation", kNames[static_cast<int>(operation)]},
                             {"engine", names[i]},
                             {"ms", times[i]},
                             {"TFLOP_per_s", flops / times[i] / 1e9},
                             {"of_dense", times[0] / times[i]},
                             {"padding_rows", padding[i]}});
    }
    const auto automatic = std::find(names.begin(), names.end(), "auto") - names.begin();
    if (automatic > kFirstEngine && automatic < std::ssize(names)) {
      const auto best =
          std::min_element(times.begin() + kFirstEngine, times.begin() + automatic) - times.begin();
      const double ratio = duel(calls[automatic], calls[best]);
      std::printf(" auto / %s %.3f", names[best].c_str(), ratio);
      results.push_back(Json{{"shape", shape.name},
                             {"split", split.name},
                             {"operation", kNames[static_cast<int>(operation)]},
                             {"best_engine", names[best]},
                             {"auto_of_best", ratio}});
    }
    std::printf("\n");
  }
}

void measure_host_time(const std::vector<std::string>& engines, Json& results) {
  const Shape shape{"host", 256, 256, 128, 128 * 16};
  const auto counts = zipf_counts(shape.rows, shape.experts, 0);
  Tensors tensors(shape, counts);
  for (const auto& name : engines) {
    const auto engine = make_grouped_gemm_engine(at::kCUDA, name);
    const auto call = [&] { run_engine(*engine, tensors, counts, Operation::kForward); };
    gpu_milliseconds(call);
    const double us = host_microseconds(call) / static_cast<double>(shape.experts);
    std::printf("host time an expert: %-15s %.2f us\n", name.c_str(), us);
    results.push_back(Json{{"engine", name}, {"host_us_per_expert", us}});
  }
}

void run(const Arguments& arguments) {
  Json results = Json::array();
  const auto engines = engine_names(arguments);
  const bool sparse = std::find(engines.begin(), engines.end(), "block_sparse") != engines.end();
  measure_host_time(engines, results);
  for (const Shape& shape : kShapes) {
    for (const Split& split : splits_of(shape, arguments.quick)) {
      measure(shape, split, engines, results);
      if (sparse) measure_topology(shape, split, results);
    }
  }
  write_gpu_results(arguments, results);
}

}  // namespace
}  // namespace anabranch::benchmark

int main(int argc, char** argv) {
  using namespace anabranch::benchmark;
  return run_benchmark(
      argc, argv,
      {"Grouped GEMM engines on a GPU beside one dense GEMM and torch._grouped_mm, bf16",
       {"json", "commit", "quick", "engine"}},
      run);
}
