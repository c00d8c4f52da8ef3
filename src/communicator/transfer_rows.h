#pragma once

#include <anabranch/communicator.h>

#include <cstdint>
#include <vector>

namespace anabranch {

/// Of one slice along dimension 0.
int64_t row_bytes(const torch::Tensor& rows);
/// Where the rows of each rank begin, and where the last end. [size + 1]
std::vector<int64_t> row_offsets(const std::vector<int64_t>& rows);
/// Uninitialised rows of `like`'s shape and type.
torch::Tensor empty_rows(int64_t rows, const torch::Tensor& like);
/// rows[i] = row `first + i` of those that are sent, for all rows of `rows`; on the current stream.
void take_sent_rows(const Transfer& transfer, int64_t first, const torch::Tensor& rows);

}  // namespace anabranch
