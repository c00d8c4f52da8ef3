#pragma once

#include <torch/types.h>

#include "gemm/hopper/maps.h"

namespace anabranch::hopper {

/// Rows of tokens [P, width], P > 0, as TMA sees them: coordinates (column,
/// kRowsEnd − rows + r, first_row + rows, kRowsWrap) are row r of an expert with `rows` rows from
/// `first_row`. From r = rows on they lie outside: read as zero, not written.
///
/// For the second dimension ends at kRowsEnd, the third adds first_row + rows rows, and the fourth
/// takes the kRowsEnd rows away again: kRowsWrap steps of 2^34 bytes less a row are kRowsEnd rows less
/// than 2^64 bytes, and addresses are counted modulo 2^64.
CUtensorMap rows_map(const torch::Tensor& rows);
/// Weights [experts, rows, width]: coordinates (column, row, expert, 0).
CUtensorMap weight_map(const torch::Tensor& weight);

}  // namespace anabranch::hopper
