#include "communicator/transfer_rows.h"

#include <ATen/ops/empty.h>

#include <iterator>
#include <numeric>

#include "kernels/rows.h"

namespace anabranch {

int64_t row_bytes(const torch::Tensor& rows) {
  auto bytes = static_cast<int64_t>(rows.element_size());
  for (const int64_t size : rows.sizes().slice(1)) {
    bytes *= size;
  }
  return bytes;
}

std::vector<int64_t> row_offsets(const std::vector<int64_t>& rows) {
  std::vector<int64_t> begin = {0};
  std::partial_sum(rows.begin(), rows.end(), std::back_inserter(begin));
  return begin;
}

torch::Tensor empty_rows(int64_t rows, const torch::Tensor& like) {
  std::vector<int64_t> sizes = like.sizes().vec();
  sizes[0] = rows;
  return at::empty(sizes, like.options());
}

void take_sent_rows(const Transfer& transfer, int64_t first, const torch::Tensor& rows) {
  if (rows.numel() == 0) {
    return;
  }
  if (!transfer.send_index.defined()) {
    rows.copy_(transfer.send.narrow(0, first, rows.size(0)));
    return;
  }
  const auto width = rows.numel() / rows.size(0);
  RowKernels::on(rows.device())
      .gather_rows_into(rows.view({-1, width}), transfer.send.view({-1, width}),
                        transfer.send_index.narrow(0, first, rows.size(0)));
}

}  // namespace anabranch
