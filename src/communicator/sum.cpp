#include "communicator/sum.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "communicator/chunks.h"

namespace anabranch {
namespace {

/// A vector [n] that the members of a level cut into chunks, one of which is this rank's.
class Level {
 public:
  Level(torch::Tensor whole, const std::vector<int>& members, int rank)
      : whole_(std::move(whole)),
        members_(members),
        place_(
            static_cast<int>(std::find(members.begin(), members.end(), rank) - members.begin())) {}

  torch::Tensor own_chunk() const { return whole_.narrow(0, begin(place_), length(place_)); }

  /// The sum of the members' chunks that are this rank's.
  torch::Tensor sum(const std::function<void(const Messages&)>& exchange) const {
    const torch::Tensor terms = at::empty({size(), length(place_)}, whole_.options());
    Messages messages{whole_.device()};
    for_each_other([&](int place) {
      add(messages.outgoing, place, whole_, begin(place), length(place));
      add(messages.incoming, place, terms, place * length(place_), length(place_));
    });
    exchange(messages);
    const auto term = [&](int place) { return place == place_ ? own_chunk() : terms[place]; };
    torch::Tensor total = term(0).to(at::toOpMathType(whole_.scalar_type()),
                                     /*non_blocking=*/false, /*copy=*/true);
    for (int place = 1; place < size(); ++place) {
      total.add_(term(place));
    }
    return total;
  }

  /// All chunks from those whose they are.
  void gather(const std::function<void(const Messages&)>& exchange) const {
    Messages messages{whole_.device()};
    for_each_other([&](int place) {
      add(messages.outgoing, place, whole_, begin(place_), length(place_));
      add(messages.incoming, place, whole_, begin(place), length(place));
    });
    exchange(messages);
  }

 private:
  int size() const { return static_cast<int>(members_.size()); }
  int64_t begin(int place) const { return chunk_begin(whole_.numel(), place, size()); }
  int64_t length(int place) const { return chunk_length(whole_.numel(), place, size()); }

  /// Every rank begins with another one.
  template <typename Work>
  void for_each_other(const Work& work) const {
    for (int step = 1; step < size(); ++step) {
      work((place_ + step) % size());
    }
  }
  /// `count` elements of `tensor` from `first` on.
  void add(std::vector<Message>& messages, int place, const torch::Tensor& tensor, int64_t first,
           int64_t count) const {
    const auto item = static_cast<int64_t>(tensor.element_size());
    if (count > 0) {
      messages.push_back({members_[place], tensor, first * item, count * item});
    }
  }

  torch::Tensor whole_;
  const std::vector<int>& members_;
  int place_;
};

}  // namespace

void sum_in_levels(torch::Tensor& tensor, int rank, const std::vector<std::vector<int>>& levels,
                   const std::function<void(const Messages&)>& exchange) {
  torch::Tensor sums = tensor.view({-1});
  torch::Tensor place = sums;  // where they are to be
  std::vector<Level> way_back;
  for (const auto& members : levels) {
    way_back.emplace_back(place, members, rank);
    sums = Level(sums, members, rank).sum(exchange);
    place = way_back.back().own_chunk();
  }
  place.copy_(sums);
  for (auto level = way_back.rbegin(); level != way_back.rend(); ++level) {
    level->gather(exchange);
  }
}

}  // namespace anabranch
