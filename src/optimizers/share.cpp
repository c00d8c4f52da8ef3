#include "optimizers/share.h"

#include <ATen/ATen.h>

#include <algorithm>

namespace anabranch {
namespace {

constexpr int64_t kPieceBytes = int64_t{16} << 20;  // of each rank at a time

int64_t bytes_of(const std::vector<torch::Tensor>& tensors) {
  int64_t bytes = 0;
  for (const auto& tensor : tensors) bytes += static_cast<int64_t>(tensor.nbytes());
  return bytes;
}

/// The bytes from `begin` on of tensors that lie one behind the other, as views: at most a piece.
std::vector<torch::Tensor> piece_of(const std::vector<torch::Tensor>& tensors, int64_t begin) {
  std::vector<torch::Tensor> views;
  const int64_t end = begin + kPieceBytes;
  int64_t offset = 0;
  for (const auto& tensor : tensors) {
    const auto bytes = static_cast<int64_t>(tensor.nbytes());
    const int64_t first = std::max(begin - offset, int64_t{0});
    const int64_t last = std::min(end - offset, bytes);
    if (first < last) {
      views.push_back(tensor.view(-1).view(at::kByte).narrow(0, first, last - first));
    }
    offset += bytes;
  }
  return views;
}

}  // namespace

void share(const std::vector<std::vector<torch::Tensor>>& by_rank, Communicator& communicator) {
  if (communicator.size() == 1) return;
  int64_t most = 0;
  torch::Tensor any;
  for (const auto& tensors : by_rank) {
    most = std::max(most, bytes_of(tensors));
    if (!tensors.empty()) any = tensors.front();
  }
  for (int64_t begin = 0; begin < most; begin += kPieceBytes) {
    const auto mine = piece_of(by_rank[communicator.rank()], begin);
    // Of one size on every rank: who has less sends what nobody reads.
    auto buffer = at::zeros({std::min(kPieceBytes, most - begin)}, any.options().dtype(at::kByte));
    if (!mine.empty()) buffer.narrow(0, 0, bytes_of(mine)).copy_(at::cat(mine));
    const auto gathered = communicator.all_gather(buffer);
    for (int rank = 0; rank < communicator.size(); ++rank) {
      if (rank == communicator.rank()) continue;
      int64_t offset = 0;
      for (auto& view : piece_of(by_rank[rank], begin)) {
        view.copy_(gathered[rank].narrow(0, offset, view.numel()));
        offset += view.numel();
      }
    }
  }
}

}  // namespace anabranch
