#include "baselines/block_sparse/cuda.h"

#include <ATen/ops/empty.h>

#include "baselines/block_sparse/hopper_launch.h"
#include "baselines/block_sparse/launch.h"
#include "gemm/hopper/tensor_map.h"
#include "gemm/hopper/hopper_engine.h"
#include "kernels/cuda/tensors.h"
#include "support/cuda/device.h"

namespace anabranch::block_sparse {
namespace {

Layout layout_of(const Topology& topology) {
  const auto data = [](const torch::Tensor& tensor) { return tensor.data_ptr<int32_t>(); };
  return {topology.block,
          topology.experts,
          topology.tokens,
          topology.width,
          topology.block_rows,
          topology.expert_columns,
          topology.first_token.data_ptr<int64_t>(),
          data(topology.block_tokens),
          data(topology.row_offsets),
          data(topology.row_indices),
          data(topology.column_indices),
          data(topology.column_offsets),
          data(topology.transposed_rows),
          data(topology.transposed_order)};
}

/// Whether the kernel for compute capability 9.0 takes a product: its boxes are 128 bytes wide and
/// begin at multiples of 16 bytes, its coordinates end at 2^30.
bool hopper_takes(const Topology& topology, const Operands& operands) {
  const auto type = operands.dense.scalar_type();
  const auto fits = [](int64_t size) {
    return size > 0 && size % 8 == 0 && size < hopper::kRowsEnd;
  };
  const auto aligned = [](const torch::Tensor& tensor) {
    return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  };
  return topology.block == 128 && (type == torch::kBFloat16 || type == torch::kHalf) &&
         fits(topology.width) && fits(operands.k()) && topology.tokens > 0 &&
         topology.tokens < hopper::kRowsEnd && aligned(operands.values) &&
         aligned(operands.dense) && aligned(operands.weight) &&
         runs_hopper(operands.dense.device());
}

}  // namespace

void fill_on_cuda(const Topology& topology, const std::vector<int64_t>& counts) {
  const torch::Device device = topology.row_offsets.device();
  const OnDevice stream(device);
  const torch::Tensor on_device = upload(counts, device);
  const torch::Tensor first =
      at::empty({2, topology.experts + 1}, on_device.options().dtype(torch::kInt64));
  launch_topology(layout_of(topology), on_device.data_ptr<int64_t>(), first.data_ptr<int64_t>(),
                  stream);
}

void multiply_on_cuda(const Topology& topology, Product product, const Operands& operands) {
  const OnDevice stream(operands.dense);
  const auto scalar = cuda::scalar_of(operands.dense);
  const Arguments arguments = {layout_of(topology),
                               operands.values.data_ptr(),
                               operands.dense.data_ptr(),
                               operands.weight.data_ptr(),
                               operands.k(),
                               operands.width_last};
  if (hopper_takes(topology, operands)) {
    const HopperMaps maps = {hopper::rows_map(operands.values), hopper::rows_map(operands.dense),
                             hopper::weight_map(operands.weight)};
    return launch_hopper(product, scalar, maps, arguments, stream);
  }
  if (scalar == cuda::Scalar::kBFloat16 || scalar == cuda::Scalar::kHalf) {
    return launch_tensor_cores(product, scalar, arguments, stream);
  }
  launch_tiled(product, scalar, arguments, stream);
}

}  // namespace anabranch::block_sparse
