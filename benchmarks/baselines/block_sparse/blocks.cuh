#pragma once

#include <type_traits>

#include "baselines/block_sparse/launch.h"

// Where the device code finds its operands and its tiles.

namespace anabranch::block_sparse {

/// A matrix in memory; outside of [rows, columns] it counts as zero.
template <typename scalar_t>
struct Panel {
  scalar_t* data;
  int row_step;
  int column_step;
  int rows;
  int columns;

  __device__ Panel transposed() const { return {data, column_step, row_step, columns, rows}; }
  __device__ bool inside(int row, int column) const { return row < rows && column < columns; }
  __device__ scalar_t& at(int row, int column) const {
    return data[static_cast<int64_t>(row) * row_step + static_cast<int64_t>(column) * column_step];
  }
};

/// The parts of S, D and W that belong to a block row, a block column or a block.
template <typename scalar_t>
class Blocks {
 public:
  using Part = Panel<scalar_t>;

  __device__ explicit Blocks(const Arguments& arguments)
      : arguments_(arguments),
        layout_(arguments.layout),
        block_(static_cast<int>(layout_.block)),
        width_(static_cast<int>(layout_.width)),
        k_(static_cast<int>(arguments.k)) {}

  /// S: columns from `start` of all blocks of a block row, side by side.
  __device__ Part values_of_row(int row, int start) const {
    return {static_cast<scalar_t*>(arguments_.values) + layout_.first_token[row] * width_ + start,
            width_, 1, layout_.block_tokens[row], width_ - start};
  }
  __device__ Part values(int block) const {
    const int row = layout_.row_indices[block];
    Part part = values_of_row(row, (block - layout_.row_offsets[row]) * block_);
    part.columns = min(part.columns, block_);
    return part;
  }
  /// D: columns from `start` of a block row's tokens.
  __device__ Part dense(int row, int start) const {
    return {static_cast<scalar_t*>(arguments_.dense) + layout_.first_token[row] * k_ + start, k_, 1,
            layout_.block_tokens[row], k_ - start};
  }
  /// W: [columns of the block column, k from `start`].
  __device__ Part weight(int column, int start) const {
    const int expert_columns = static_cast<int>(layout_.expert_columns);
    const int expert = column / expert_columns;
    const int first = (column - expert * expert_columns) * block_;
    const bool width_last = arguments_.width_last;
    const Part all = {
        static_cast<scalar_t*>(arguments_.weight) + static_cast<int64_t>(expert) * width_ * k_,
        width_last ? 1 : k_, width_last ? width_ : 1, width_, k_};
    return {&all.at(first, start), all.row_step, all.column_step, min(block_, width_ - first),
            k_ - start};
  }

 private:
  const Arguments& arguments_;
  const Layout& layout_;
  int block_;
  int width_;
  int k_;
};

/// Rows of a band of tiles, see tile_place.
constexpr int kBandRows = 2048;

/// What a line of tiles is: a block row, or, of kDds, a block column.
inline int64_t lines_of(Product product, const Layout& layout) {
  return product == Product::kDds ? layout.experts * layout.expert_columns : layout.block_rows;
}

struct TilePlace {
  int line;
  int across;
};

/// Of tile `tile` of lines x across, in bands of lines, column by column: the tiles that are in flight
/// together share lines and columns.
__device__ __forceinline__ TilePlace tile_place(int64_t tile, int lines, int across,
                                                int band_lines) {
  const int64_t band_tiles = static_cast<int64_t>(band_lines) * across;
  const int band = static_cast<int>(tile / band_tiles);
  const int in_band = static_cast<int>(tile - band * band_tiles);
  const int height = min(band_lines, lines - band * band_lines);
  return {band * band_lines + in_band % height, in_band / height};
}

/// Calls `body` with the product and the block as compile-time constants.
template <typename Body>
void dispatch_product(Product product, int64_t block, const Body& body) {
  const auto with_product = [&](auto block_constant) {
    switch (product) {
      case Product::kSdd:
        return body(std::integral_constant<Product, Product::kSdd>{}, block_constant);
      case Product::kDsd:
        return body(std::integral_constant<Product, Product::kDsd>{}, block_constant);
      case Product::kDds:
        return body(std::integral_constant<Product, Product::kDds>{}, block_constant);
    }
  };
  switch (block) {
    case 128:
      return with_product(std::integral_constant<int, 128>{});
    case 64:
      return with_product(std::integral_constant<int, 64>{});
    default:
      return with_product(std::integral_constant<int, 32>{});
  }
}

}  // namespace anabranch::block_sparse
