#include "gemm/cpu/few_rows.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "support/check.h"

namespace anabranch {
namespace {

/// So many are quicker here whatever the weight: reading it takes longer than multiplying. Beyond, LibTorch multiplies
/// bf16 pairwise where the processor does, twice as fast.
constexpr int64_t kFewRows = 3;
/// Of more rows, multiplications that take no longer than a call of LibTorch's product costs; adding up the lanes of one
/// result takes as long as kLanesOfResult of them.
constexpr int64_t kQuickerThanACall = 1 << 19;
constexpr int64_t kLanesOfResult = 300;
/// Rows of x that one pass over a row of the weight serves.
constexpr int kRowsOfPass = 4;
/// Multiplications that are worth a thread's start.
constexpr int64_t kWorthAThread = 1 << 17;

/// Vectors of a processor.
template <int kLanes>
struct Lanes {
  typedef float Floats __attribute__((vector_size(kLanes * sizeof(float))));
  typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t))));
};

/// Two values of bf16 lie in one word of a weight's row: the first in its lower half. A row of x is laid out for that, as
/// kLanes values of even place, then kLanes of odd place, and so on, with zeros behind its k values.
struct Operands {
  const float* x;
  int64_t x_stride;
  int64_t rows;
  const c10::BFloat16* weight;
  int64_t weight_stride;
  int64_t k;
  c10::BFloat16* y;
  int64_t y_stride;
};

/// Sums of kRows rows of x by kColumns rows of the weight, in registers.
template <int kLanes, int kRows, int kColumns>
struct Sums {
  using Floats = typename Lanes<kLanes>::Floats;
  using Words = typename Lanes<kLanes>::Words;

  Floats of[kRows][kColumns] = {};

  /// 2 * kLanes values of each row.
  [[gnu::always_inline]] void add(const float* x, int64_t x_stride, const c10::BFloat16* weight,
                                  int64_t weight_stride) {
    for (int c = 0; c < kColumns; ++c) {
      Words words;
      std::memcpy(&words, weight + c * weight_stride, sizeof(words));
      const auto even = __builtin_bit_cast(Floats, words << 16);
      const auto odd = __builtin_bit_cast(Floats, words & 0xffff0000U);
      for (int r = 0; r < kRows; ++r) {
        Floats x_even, x_odd;
        std::memcpy(&x_even, x + r * x_stride, sizeof(x_even));
        std::memcpy(&x_odd, x + r * x_stride + kLanes, sizeof(x_odd));
        of[r][c] += x_even * even;
        of[r][c] += x_odd * odd;
      }
    }
  }

  [[gnu::always_inline]] float total(int row, int column) const {
    float parts[kLanes];
    std::memcpy(parts, &of[row][column], sizeof(parts));
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int lane = 0; lane < half; ++lane) parts[lane] += parts[lane + half];
    }
    return parts[0];
  }
};

/// kRows rows of x by kColumns rows of the weight.
template <int kLanes, int kRows, int kColumns>
[[gnu::always_inline]] inline void multiply_block(const Operands& of, int64_t row, int64_t column) {
  constexpr int kStep = 2 * kLanes;
  Sums<kLanes, kRows, kColumns> sums;
  const auto* const x = of.x + row * of.x_stride;
  const auto* const weight = of.weight + column * of.weight_stride;
  const int64_t whole = of.k / kStep * kStep;
  for (int64_t i = 0; i < whole; i += kStep) {
    sums.add(x + i, of.x_stride, weight + i, of.weight_stride);
  }
  if (whole < of.k) {
    c10::BFloat16 rest[kColumns][kStep] = {};
    for (int c = 0; c < kColumns; ++c) {
      std::copy_n(weight + c * of.weight_stride + whole, of.k - whole, rest[c]);
    }
    sums.add(x + whole, of.x_stride, rest[0], kStep);
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kColumns; ++c) {
      of.y[(row + r) * of.y_stride + column + c] = sums.total(r, c);
    }
  }
}

/// All rows of x by kColumns rows of the weight.
template <int kLanes, int kColumns>
[[gnu::always_inline]] inline void multiply_columns(const Operands& of, int64_t column) {
  int64_t row = 0;
  for (; row + kRowsOfPass <= of.rows; row += kRowsOfPass) {
    multiply_block<kLanes, kRowsOfPass, kColumns>(of, row, column);
  }
  switch (of.rows - row) {
    case 3:
      return multiply_block<kLanes, 3, kColumns>(of, row, column);
    case 2:
      return multiply_block<kLanes, 2, kColumns>(of, row, column);
    case 1:
      return multiply_block<kLanes, 1, kColumns>(of, row, column);
    default:
      return;
  }
}

/// By the rows `begin` to `end` of the weight. kColumns: as many as there are registers for sums.
template <int kLanes, int kColumns>
[[gnu::always_inline]] inline void multiply_part(const Operands& of, int64_t begin, int64_t end) {
  int64_t column = begin;
  for (; column + kColumns <= end; column += kColumns) {
    multiply_columns<kLanes, kColumns>(of, column);
  }
  for (; column < end; ++column) {
    multiply_columns<kLanes, 1>(of, column);
  }
}

using MultiplyPart = void (*)(const Operands&, int64_t begin, int64_t end);

struct Way {
  int lanes;
  MultiplyPart multiply;
};

void multiply_with_4(const Operands& of, int64_t begin, int64_t end) {
  multiply_part<4, 2>(of, begin, end);
}

#ifdef __x86_64__
[[gnu::target("avx2,fma")]] void multiply_with_8(const Operands& of, int64_t begin, int64_t end) {
  multiply_part<8, 2>(of, begin, end);
}

[[gnu::target("avx512f")]] void multiply_with_16(const Operands& of, int64_t begin, int64_t end) {
  multiply_part<16, 4>(of, begin, end);
}
#endif

/// Those that this processor has, widest first.
const std::vector<Way>& ways() {
  static const auto all = [] {
    std::vector<Way> found;
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx512f")) found.push_back({16, multiply_with_16});
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      found.push_back({8, multiply_with_8});
    }
#endif
    found.push_back({4, multiply_with_4});
    return found;
  }();
  return all;
}

/// The rows of x as Operands has them.
std::vector<float> laid_out(const torch::Tensor& x, int lanes, int64_t stride) {
  std::vector<float> rows(x.size(0) * stride, 0.0F);
  const auto* values = x.const_data_ptr<c10::BFloat16>();
  for (int64_t row = 0; row < x.size(0); ++row) {
    for (int64_t i = 0; i < x.size(1); ++i) {
      const int64_t block = i / (2 * lanes) * (2 * lanes);
      const int64_t place = block + (i % 2) * lanes + (i - block) / 2;
      rows[row * stride + place] = values[row * x.stride(0) + i];
    }
  }
  return rows;
}

}  // namespace

bool takes_few_rows(const torch::Tensor& x, const torch::Tensor& weight) {
  const int64_t results = x.size(0) * weight.size(0);
  return x.scalar_type() == torch::kBFloat16 && x.stride(1) == 1 && weight.stride(1) == 1 &&
         (x.size(0) <= kFewRows || results * (x.size(1) + kLanesOfResult) <= kQuickerThanACall);
}

std::vector<int> vector_widths() {
  std::vector<int> widths;
  for (const Way& way : ways()) widths.push_back(way.lanes);
  return widths;
}

void multiply_few_rows(const torch::Tensor& x, const torch::Tensor& weight, torch::Tensor& y,
                       int lanes) {
  const auto chosen = std::find_if(ways().begin(), ways().end(), [&](const Way& way) {
    return lanes == 0 || way.lanes == lanes;
  });
  check_input(chosen != ways().end(), "there are no vectors of ", lanes, " floats");
  const Way& with = *chosen;
  const int64_t k = x.size(1), block = 2 * with.lanes;
  const int64_t stride = (k + block - 1) / block * block;
  const auto rows = laid_out(x, with.lanes, stride);
  const Operands operands = {rows.data(),
                             stride,
                             x.size(0),
                             weight.const_data_ptr<c10::BFloat16>(),
                             weight.stride(0),
                             k,
                             y.mutable_data_ptr<c10::BFloat16>(),
                             y.stride(0)};
  const int64_t grain = kWorthAThread / std::max<int64_t>(1, x.size(0) * k) + 1;
  at::parallel_for(0, weight.size(0), grain,
                   [&](int64_t begin, int64_t end) { with.multiply(operands, begin, end); });
}

}  // namespace anabranch
