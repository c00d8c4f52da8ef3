#pragma once

#include <anabranch/exchange.h>

#include "kernels/pieces.h"

namespace anabranch {

/// Rows of a rank's tokens of pieces `first` .. `last` − 1 on their way between the token's side, where
/// rows are ordered by (expert's rank, token), and the experts', where they are by (token's rank, token).
class PieceRows {
 public:
  struct Range {
    int64_t begin;
    int64_t rows;

    torch::Tensor of(const torch::Tensor& tensor) const { return tensor.narrow(0, begin, rows); }
  };

  PieceRows(const ExchangePlan& plan, int64_t first, int64_t last)
      : sent_(ranges(plan.send_rows, plan.send_piece_rows, first, last)),
        received_(ranges(plan.receive_rows, plan.receive_piece_rows, first, last)) {}

  /// At the token's side, of experts of `rank`.
  const Range& sent(int64_t rank) const { return sent_[rank]; }
  /// At the experts' side, of tokens of `rank`.
  const Range& received(int64_t rank) const { return received_[rank]; }

  /// The rows of other ranks from `source`, at the token's side, to `target`, at the experts'.
  std::vector<Transfer> there(int rank, const torch::Tensor& source,
                              const torch::Tensor& target) const {
    return transfers(rank, source, sent_, target, received_);
  }
  /// And back.
  std::vector<Transfer> back(int rank, const torch::Tensor& source,
                             const torch::Tensor& target) const {
    return transfers(rank, source, received_, target, sent_);
  }

 private:
  using Ranges = std::vector<Range>;

  static Ranges ranges(const std::vector<int64_t>& rows, const std::vector<int64_t>& piece_rows,
                       int64_t first, int64_t last) {
    Ranges result;
    int64_t begin = 0;
    for (size_t rank = 0; rank < rows.size(); ++rank) {
      const int64_t* of_piece = &piece_rows[rank * kPieces];
      Range range{begin, 0};
      for (int64_t piece = 0; piece < last; ++piece) {
        (piece < first ? range.begin : range.rows) += of_piece[piece];
      }
      result.push_back(range);
      begin += rows[rank];
    }
    return result;
  }

  /// One for each distance between ranks: its rows go to one rank, and come from one.
  static std::vector<Transfer> transfers(int rank, const torch::Tensor& source,
                                         const Ranges& outgoing, const torch::Tensor& target,
                                         const Ranges& incoming) {
    const auto ranks = static_cast<int>(outgoing.size());
    std::vector<Transfer> result;
    for (int distance = 1; distance < ranks; ++distance) {
      const int to = (rank + distance) % ranks;
      const int from = (rank + ranks - distance) % ranks;
      Transfer transfer{outgoing[to].of(source), std::vector<int64_t>(ranks, 0),
                        incoming[from].of(target), std::vector<int64_t>(ranks, 0)};
      transfer.send_rows[to] = outgoing[to].rows;
      transfer.receive_rows[from] = incoming[from].rows;
      result.push_back(std::move(transfer));
    }
    return result;
  }

  Ranges sent_;
  Ranges received_;
};

}  // namespace anabranch
