#include "baselines/block_sparse/topology.h"

#include <ATen/ops/empty.h>

#include <limits>
#include <numeric>

#include "baselines/block_sparse/cuda.h"
#include "support/check.h"

namespace anabranch::block_sparse {
namespace {

void fill_on_cpu(const Topology& topology, const std::vector<int64_t>& counts) {
  const auto data = [](const torch::Tensor& tensor) { return tensor.data_ptr<int32_t>(); };
  int32_t row = 0;
  int32_t block = 0;
  int64_t token = 0;
  int32_t transposed = 0;
  const auto columns = static_cast<int32_t>(topology.expert_columns);
  for (size_t e = 0; e < counts.size(); ++e) {
    const auto first_column = static_cast<int32_t>(e) * columns;
    const int32_t first_row = row;
    const int32_t first_block = block;
    for (int64_t done = 0; done < counts[e]; done += topology.block, ++row) {
      topology.first_token.data_ptr<int64_t>()[row] = token + done;
      data(topology.block_tokens)[row] =
          static_cast<int32_t>(std::min(topology.block, counts[e] - done));
      data(topology.row_offsets)[row] = block;
      for (int32_t c = 0; c < columns; ++c, ++block) {
        data(topology.row_indices)[block] = row;
        data(topology.column_indices)[block] = first_column + c;
      }
    }
    for (int32_t c = 0; c < columns; ++c) {
      data(topology.column_offsets)[first_column + c] = transposed;
      for (int32_t r = first_row; r < row; ++r, ++transposed) {
        data(topology.transposed_rows)[transposed] = r;
        data(topology.transposed_order)[transposed] = first_block + (r - first_row) * columns + c;
      }
    }
    token += counts[e];
  }
  data(topology.row_offsets)[row] = block;
  data(topology.column_offsets)[topology.block_columns()] = transposed;
}

}  // namespace

Topology build_topology(const std::vector<int64_t>& counts, int64_t width, int64_t block,
                        torch::Device device) {
  check_input(block == 128 || block == 64 || block == 32,
              "block-sparse products have blocks of 128, 64 or 32, not ", block);
  Topology topology = {};
  topology.block = block;
  topology.experts = static_cast<int64_t>(counts.size());
  topology.tokens = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  topology.width = width;
  for (const int64_t count : counts) {
    topology.block_rows += (count + block - 1) / block;
  }
  topology.expert_columns = (width + block - 1) / block;
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() - 1;
  const int64_t larger_side = std::max(topology.block_rows, topology.experts);
  check_input(topology.expert_columns == 0 || larger_side <= kMost / topology.expert_columns,
              "block-sparse products have fewer than 2^31 blocks, not ", larger_side, " times ",
              topology.expert_columns);

  const auto options = at::TensorOptions(device).dtype(torch::kInt32);
  const int64_t blocks = topology.blocks();
  topology.first_token = at::empty({topology.block_rows}, options.dtype(torch::kInt64));
  topology.block_tokens = at::empty({topology.block_rows}, options);
  topology.row_offsets = at::empty({topology.block_rows + 1}, options);
  topology.column_offsets = at::empty({topology.block_columns() + 1}, options);
  for (auto* indices : {&topology.row_indices, &topology.column_indices, &topology.transposed_rows,
                        &topology.transposed_order}) {
    *indices = at::empty({blocks}, options);
  }
  if (device.is_cuda()) {
    fill_on_cuda(topology, counts);
  } else {
    fill_on_cpu(topology, counts);
  }
  return topology;
}

}  // namespace anabranch::block_sparse
