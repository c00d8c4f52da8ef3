// The CPU engine beside a plain loop of at::mm over the experts, in the same rounds.
#include <anabranch/grouped_gemm.h>
#include <torch/torch.h>

#include <cstdio>

#include "cpu/measure.h"
#include "harness.h"

namespace anabranch::benchmark {
namespace {

struct Shape {
  int64_t rows;
  int64_t k;
  int64_t n;
  int64_t experts;
};

constexpr Shape kShapes[] = {{8192, 512, 1024, 8}, {32768, 512, 1024, 64}, {4096, 256, 256, 128}};

constexpr double kZipf = 0.8;

/// Calls `product(expert, first_row, rows)` for each expert.
template <typename Product>
void for_each_expert(const std::vector<int64_t>& counts, const Product& product) {
  int64_t first = 0;
  for (size_t e = 0; e < counts.size(); ++e) {
    product(static_cast<int64_t>(e), first, counts[e]);
    first += counts[e];
  }
}

Json measure(const Shape& shape, bool zipf, int rounds) {
  const torch::NoGradGuard no_grad;
  const auto counts = zipf_counts(shape.rows, shape.experts, zipf ? kZipf : 0);
  const auto engine = make_grouped_gemm_engine(torch::kCPU);
  const auto x = torch::randn({shape.rows, shape.k});
  const auto dy = torch::randn({shape.rows, shape.n});
  const auto weight = torch::randn({shape.experts, shape.n, shape.k});
  auto y = torch::empty_like(dy);
  auto dx = torch::empty_like(x);
  auto dweight = torch::empty_like(weight);
  const auto part = [](const torch::Tensor& t, int64_t first, int64_t rows) {
    return t.narrow(0, first, rows);
  };
  const auto times =
      milliseconds({[&] { engine->forward(x, weight, counts, y); },
                    [&] {
                      for_each_expert(counts, [&](int64_t e, int64_t first, int64_t rows) {
                        auto out = part(y, first, rows);
                        at::mm_out(out, part(x, first, rows), weight[e].t());
                      });
                    },
                    [&] { engine->dgrad(dy, weight, counts, dx); },
                    [&] {
                      for_each_expert(counts, [&](int64_t e, int64_t first, int64_t rows) {
                        auto out = part(dx, first, rows);
                        at::mm_out(out, part(dy, first, rows), weight[e]);
                      });
                    },
                    [&] { engine->wgrad(dy, x, counts, dweight); },
                    [&] {
                      for_each_expert(counts, [&](int64_t e, int64_t first, int64_t rows) {
                        auto out = dweight[e];
                        at::mm_out(out, part(dy, first, rows).t(), part(x, first, rows));
                      });
                    }},
                   rounds);

  Json results = Json::array();
  const double gflop = 2e-9 * static_cast<double>(shape.rows * shape.k * shape.n);
  const char* names[] = {"fwd", "dX", "dW"};
  for (int i = 0; i < 3; ++i) {
    const double engine_ms = times[2 * i];
    const double loop_ms = times[2 * i + 1];
    std::printf("%6ld rows %4ld→%4ld %3ld experts %-4s %-3s %8.2f ms %7.1f GFLOP/s %5.2f× loop\n",
                shape.rows, shape.k, shape.n, shape.experts, zipf ? "zipf" : "uni", names[i],
                engine_ms, gflop / engine_ms * 1e3, loop_ms / engine_ms);
    results.push_back({{"rows", shape.rows},
                       {"k", shape.k},
                       {"n", shape.n},
                       {"experts", shape.experts},
                       {"split", zipf ? "zipf" : "uni"},
                       {"operation", names[i]},
                       {"engine_ms", engine_ms},
                       {"loop_ms", loop_ms},
                       {"speedup", loop_ms / engine_ms}});
  }
  return results;
}

void run(const Arguments& arguments) {
  Json results = Json::array();
  for (const Shape& shape : kShapes) {
    for (const bool zipf : {false, true}) {
      for (const auto& result : measure(shape, zipf, arguments.rounds)) {
        results.push_back(result);
      }
    }
    if (arguments.quick) {
      break;
    }
  }
  write_results(arguments, results);
}

}  // namespace
}  // namespace anabranch::benchmark

int main(int argc, char** argv) {
  using namespace anabranch::benchmark;
  return run_benchmark(argc, argv,
                       {"Grouped GEMM on the CPU beside a plain loop of at::mm, fp32",
                        {"json", "commit", "quick", "rounds", "threads"}},
                       run);
}
