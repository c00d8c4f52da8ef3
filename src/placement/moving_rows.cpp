#include "placement/moving_rows.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "support/numbers_on.h"
#include "support/sum.h"

namespace anabranch {

std::vector<Move> moves_between(const ExpertPlacement& from, const ExpertPlacement& to,
                                const std::vector<int64_t>& holders) {
  const auto before = from.place_of_experts();
  const auto after = to.place_of_experts();
  std::vector<Move> moves;
  for (int64_t expert = 0; expert < from.num_experts; ++expert) {
    const int64_t old = before[expert];
    const int64_t next = after[expert];
    if (old != next) moves.push_back({holders[old], holders[next], old, next});
  }
  // In the order in which they are sent and received.
  std::sort(moves.begin(), moves.end(),
            [](const Move& one, const Move& other) { return one.to_place < other.to_place; });
  return moves;
}

int64_t moved_experts(const ExpertPlacement& from, const ExpertPlacement& to) {
  const auto before = from.all();
  const auto after = to.all();
  int64_t moved = 0;
  for (size_t place = 0; place < before.size(); ++place) {
    moved += before[place] == after[place] ? 0 : 1;
  }
  return moved;
}

namespace {

/// The rows of one tensor on their way.
class RowsOnTheirWay {
 public:
  RowsOnTheirWay(const MovingRows& rows, int64_t rank, int64_t ranks)
      : tensor_(rows.tensor.detach()), send_rows_(ranks, 0), receive_rows_(ranks, 0) {
    std::vector<int64_t> leaving, coming;
    for (int64_t other = 0; other < ranks; ++other) {
      for (const auto& [from_rank, to_rank, from_place, to_place] : rows.moves) {
        if (from_rank == rank && to_rank == other) {
          leaving.push_back(from_place - rows.first_place);
          ++send_rows_[other];
        }
        if (to_rank == rank && from_rank == other) {
          coming.push_back(to_place - rows.first_place);
          ++receive_rows_[other];
        }
      }
    }
    leaving_ = numbers_on(tensor_.device(), leaving);
    coming_ = numbers_on(tensor_.device(), coming);
    auto sizes = tensor_.sizes().vec();
    sizes[0] = sum(receive_rows_);
    received_ = at::empty(sizes, tensor_.options());
  }

  Transfer transfer() const {
    return {tensor_.index_select(0, leaving_), send_rows_, received_, receive_rows_};
  }
  /// When they have come.
  void put() { tensor_.index_copy_(0, coming_, received_); }

 private:
  torch::Tensor tensor_;
  std::vector<int64_t> send_rows_, receive_rows_;
  torch::Tensor leaving_, coming_;  ///< rows of it
  torch::Tensor received_;
};

}  // namespace

void move_rows(Communicator& communicator, const std::vector<MovingRows>& tensors) {
  const at::NoGradGuard no_grad;
  std::vector<RowsOnTheirWay> moving;
  std::vector<Transfer> transfers;
  for (const auto& tensor : tensors) {
    moving.emplace_back(tensor, communicator.rank(), communicator.size());
    transfers.push_back(moving.back().transfer());
  }
  communicator.all_to_all_v(transfers);
  for (auto& rows : moving) rows.put();
}

}  // namespace anabranch
