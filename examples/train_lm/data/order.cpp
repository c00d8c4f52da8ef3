#include "data/order.h"

#include <bit>

#include "data/random.h"

namespace train_lm {

Shuffle::Shuffle(int64_t size, uint64_t seed, uint64_t epoch)
    : size_(static_cast<uint64_t>(size)),
      half_bits_((static_cast<unsigned>(std::bit_width(size_ - 1)) + 1) / 2) {
  for (uint64_t round = 0; round < keys_.size(); ++round) {
    keys_[round] = mixed_seed(seed, Stream::kOrder, epoch * keys_.size() + round);
  }
}

uint64_t Shuffle::once(uint64_t index) const {
  const uint64_t mask = (uint64_t{1} << half_bits_) - 1;
  uint64_t left = index >> half_bits_, right = index & mask;
  for (const uint64_t key : keys_) {
    const uint64_t next = left ^ (mixed_bits(key ^ right) & mask);
    left = right;
    right = next;
  }
  return left << half_bits_ | right;
}

int64_t Shuffle::operator()(int64_t index) const {
  auto result = static_cast<uint64_t>(index);
  do {
    result = once(result);
  } while (result >= size_);
  return static_cast<int64_t>(result);
}

}  // namespace train_lm
