#pragma once

#include <array>
#include <cstdint>

namespace train_lm {

/// A permutation of 0 … size − 1, made of nothing but its seed and the epoch: a Feistel network of four
/// rounds over the next even power of two, whose results beyond `size` go through it again.
class Shuffle {
 public:
  Shuffle(int64_t size, uint64_t seed, uint64_t epoch);
  int64_t operator()(int64_t index) const;

 private:
  uint64_t once(uint64_t index) const;

  uint64_t size_;
  unsigned half_bits_;
  std::array<uint64_t, 4> keys_;
};

}  // namespace train_lm
