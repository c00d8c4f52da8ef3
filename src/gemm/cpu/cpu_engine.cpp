#include "gemm/cpu/cpu_engine.h"

#include <ATen/Parallel.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <atomic>
#include <numeric>

#include "gemm/cpu/few_rows.h"
#include "support/block.h"

namespace anabranch {
namespace {

/// A part of one expert's product: `extent` output rows (forward, dgrad: of its tokens; wgrad: of
/// its weight) from `start`.
struct Piece {
  int64_t expert;
  int64_t first_row;  // of the expert, among all rows
  int64_t start;
  int64_t extent;
  int64_t cost;
};

/// Experts cut into pieces of at most `largest` tokens' worth of work, largest first. `extent(count)`
/// is the number of output rows of an expert with `count` tokens.
template <typename Extent>
std::vector<Piece> cut(const std::vector<int64_t>& counts, int64_t largest, const Extent& extent) {
  constexpr int64_t kSmallestExtent = 64;
  std::vector<Piece> pieces;
  int64_t first_row = 0;
  for (size_t e = 0; e < counts.size(); ++e) {
    const int64_t rows = extent(counts[e]);
    const int64_t wanted = std::max<int64_t>(1, (counts[e] + largest - 1) / largest);
    const int64_t step = std::max(kSmallestExtent, (rows + wanted - 1) / wanted);
    for (int64_t start = 0; start < rows; start += step) {
      const int64_t size = std::min(step, rows - start);
      pieces.push_back({static_cast<int64_t>(e), first_row, start, size, size * counts[e] / rows});
    }
    first_row += counts[e];
  }
  std::stable_sort(pieces.begin(), pieces.end(),
                   [](const Piece& a, const Piece& b) { return a.cost > b.cost; });
  return pieces;
}

/// The most work of a thread, when each takes the next piece as it becomes free.
int64_t longest_share(const std::vector<Piece>& pieces, int threads) {
  std::vector<int64_t> shares(threads);
  for (const Piece& piece : pieces) {
    *std::min_element(shares.begin(), shares.end()) += piece.cost;
  }
  return *std::max_element(shares.begin(), shares.end());
}

/// Pieces that keep all threads busy to the end, and no smaller than that takes: a product packs its
/// whole other operand, however few rows it has itself.
template <typename Extent>
std::vector<Piece> cut(const std::vector<int64_t>& counts, const Extent& extent) {
  const int threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t total = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  const int64_t share = total / threads + 1;
  std::vector<Piece> pieces;
  for (const int64_t per_share : {1, 2, 4}) {
    pieces = cut(counts, share / per_share + 1, extent);
    if (threads == 1 || longest_share(pieces, threads) <= share + share / 20) {
      break;
    }
  }
  return pieces;
}

/// Every thread takes the next piece until none is left. Each output element belongs to one piece,
/// so the result does not depend on who took what.
template <typename Compute>
void run(const std::vector<Piece>& pieces, const Compute& compute) {
  std::atomic<size_t> next = 0;
  const auto work = [&](int64_t, int64_t) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    for (size_t i = next++; i < pieces.size(); i = next++) {
      compute(pieces[i]);
    }
  };
  if (pieces.size() == 1) {
    work(0, 1);  // outside a parallel region the product itself uses all threads
  } else {
    at::parallel_for(0, at::get_num_threads(), 1, work);
  }
}

/// Of an expert's weight [n, k], among those of all [E, n, k], rows `first` to `first + count`.
torch::Tensor weight_of(const torch::Tensor& weight, int64_t expert, int64_t first, int64_t count) {
  const int64_t element = expert * weight.stride(0) + first * weight.stride(1);
  return part_of(weight, element * static_cast<int64_t>(weight.element_size()),
                 weight.scalar_type(), {count, weight.size(2)}, weight.strides().slice(1));
}

torch::Tensor weight_of(const torch::Tensor& weight, int64_t expert) {
  return weight_of(weight, expert, 0, weight.size(1));
}

/// Without a dispatch, as part_of.
torch::Tensor transposed(const torch::Tensor& matrix) {
  return part_of(matrix, 0, matrix.scalar_type(), {matrix.size(1), matrix.size(0)},
                 {matrix.stride(1), matrix.stride(0)});
}

class CpuEngine : public GroupedGemmEngine {
 public:
  std::string name() const override { return "cpu"; }

 private:
  void do_forward(const torch::Tensor& x, const torch::Tensor& weight, const ExpertCounts& counts,
                  torch::Tensor& y) override {
    run(cut(counts.on_host(), [](int64_t count) { return count; }), [&](const Piece& piece) {
      const int64_t first = piece.first_row + piece.start;
      auto out = rows_of(y, first, piece.extent);
      const auto rows = rows_of(x, first, piece.extent);
      const auto matrix = weight_of(weight, piece.expert);
      if (takes_few_rows(rows, matrix)) {
        multiply_few_rows(rows, matrix, out);
      } else {
        at::mm_out(out, rows, transposed(matrix));
      }
    });
  }

  void do_dgrad(const torch::Tensor& dy, const torch::Tensor& weight, const ExpertCounts& counts,
                torch::Tensor& dx) override {
    run(cut(counts.on_host(), [](int64_t count) { return count; }), [&](const Piece& piece) {
      const int64_t first = piece.first_row + piece.start;
      auto out = rows_of(dx, first, piece.extent);
      at::mm_out(out, rows_of(dy, first, piece.extent), weight_of(weight, piece.expert));
    });
  }

  void do_wgrad(const torch::Tensor& dy, const torch::Tensor& x, const ExpertCounts& counts,
                torch::Tensor& dweight) override {
    const int64_t rows = dweight.size(1);
    run(cut(counts.on_host(), [&](int64_t) { return rows; }), [&](const Piece& piece) {
      auto out = weight_of(dweight, piece.expert, piece.start, piece.extent);
      const int64_t count = counts.on_host()[piece.expert];
      if (count == 0) {
        out.zero_();
      } else {
        const auto dy_part = rows_of(dy, piece.first_row, count, piece.start, piece.extent);
        at::mm_out(out, transposed(dy_part), rows_of(x, piece.first_row, count));
      }
    });
  }
};

}  // namespace

std::shared_ptr<GroupedGemmEngine> make_cpu_engine() { return std::make_shared<CpuEngine>(); }

}  // namespace anabranch
