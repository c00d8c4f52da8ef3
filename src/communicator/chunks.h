#pragma once

#include <cstdint>

namespace anabranch {

/// First element of chunk `rank` when `elements` are cut into `size` chunks of nearly equal length;
/// chunk `size` begins at the end. A rank sums the chunk of its own number in an all_reduce.
constexpr int64_t chunk_begin(int64_t elements, int rank, int size) {
  return elements / size * rank + elements % size * rank / size;
}

constexpr int64_t chunk_length(int64_t elements, int rank, int size) {
  return chunk_begin(elements, rank + 1, size) - chunk_begin(elements, rank, size);
}

}  // namespace anabranch
