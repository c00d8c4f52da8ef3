#pragma once

#include <ATen/Parallel.h>
#include <c10/core/Device.h>

#include <algorithm>
#include <cstdint>

namespace anabranch {

/// In how many parts experts with so many `rows` are worked through at most. Only one part's intermediate values
/// are alive at a time, in memory that is warm from the part before; many threads want larger parts to share, and
/// few rows are not worth the calls of several: a model that decodes has one part. On a GPU every launch counts,
/// and an engine balances itself over all experts: one part.
inline int64_t most_parts(c10::Device device, int64_t rows) {
  constexpr int64_t kLeastRows = 32;  // of a part
  const int64_t worth_it = std::max<int64_t>(1, rows / kLeastRows);
  return device.is_cpu() ? std::min<int64_t>(std::clamp(32 / at::get_num_threads(), 1, 8), worth_it)
                         : 1;
}

/// In how many pieces the rows of an expert are worked through at most, where so many parts are to be had of so many
/// experts.
inline int64_t most_pieces(int64_t parts, int64_t experts) {
  return std::max<int64_t>(1, parts / std::max<int64_t>(1, experts));
}

/// In how many pieces so many rows of an expert are: an expert's weights are read again for each.
inline int64_t pieces_of(int64_t rows, int64_t most) {
  constexpr int64_t kLeastRows = 128;  // of a piece
  return std::clamp<int64_t>(rows / kLeastRows, 1, most);
}
/// The rows of the longest of them.
inline int64_t longest_piece(int64_t rows, int64_t most) {
  const int64_t pieces = pieces_of(rows, most);
  return (rows + pieces - 1) / pieces;
}

}  // namespace anabranch
