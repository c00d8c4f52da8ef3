#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <anabranch/communicator.h>

#include <numeric>

#include "communicator/chunks.h"
#include "communicator/row_bytes.h"
#include "support/check.h"

namespace anabranch {
namespace {

void check_tensor(const char* call, const char* what, const torch::Tensor& tensor) {
  check_input(tensor.defined(), call, ": ", what, " is undefined");
  check_input(tensor.layout() == torch::kStrided, call, ": ", what, " has layout ", tensor.layout(),
              ", expected a dense tensor");
  check_input(tensor.is_contiguous(), call, ": ", what, " of sizes ", tensor.sizes(),
              " and strides ", tensor.strides(), " is not contiguous");
}

/// `rows_per_peer` holds a count for each of `size` ranks, and they sum to the rows of `tensor`.
void check_rows(const char* what, const torch::Tensor& tensor,
                const std::vector<int64_t>& rows_per_peer, int size) {
  check_input(tensor.dim() >= 1, "all_to_all_v: ", what, " has no dimension of rows");
  check_input(rows_per_peer.size() == static_cast<size_t>(size), "all_to_all_v: ", what,
              "_rows has ", rows_per_peer.size(), " counts, expected one for each of ", size,
              " ranks");
  int64_t sum = 0;
  for (int peer = 0; peer < size; ++peer) {
    const int64_t rows = rows_per_peer[peer];
    check_input(rows >= 0, "all_to_all_v: ", what, "_rows[", peer, "] is ", rows);
    check_input(!__builtin_add_overflow(sum, rows, &sum), "all_to_all_v: the sum of ", what,
                "_rows does not fit into 64 bits");
  }
  check_input(sum == tensor.size(0), "all_to_all_v: ", what, " has ", tensor.size(0), " rows, but ",
              what, "_rows sum to ", sum);
}

/// The tensor of as many rows as are sent.
const torch::Tensor& sent_rows(const Transfer& transfer) {
  return transfer.send_index.defined() ? transfer.send_index : transfer.send;
}

void check_index(const Transfer& transfer, bool gathers_rows) {
  const torch::Tensor& index = transfer.send_index;
  check_input(gathers_rows && transfer.send.is_cuda(),
              "all_to_all_v: this communicator takes no send_index for tensors on ",
              transfer.send.device());
  check_tensor("all_to_all_v", "send_index", index);
  check_input(index.dim() == 1 && index.scalar_type() == at::kLong &&
                  index.device() == transfer.send.device(),
              "all_to_all_v: send_index is ", index.scalar_type(), " of sizes ", index.sizes(),
              " on ", index.device(), ", expected one dimension of Long on ",
              transfer.send.device());
}

void check_transfer(const Transfer& transfer, int rank, int size, bool gathers_rows) {
  const torch::Tensor& send = transfer.send;
  const torch::Tensor& receive = transfer.receive;
  check_tensor("all_to_all_v", "send", send);
  check_tensor("all_to_all_v", "receive", receive);
  if (transfer.send_index.defined()) {
    check_index(transfer, gathers_rows);
  }
  check_input(send.scalar_type() == receive.scalar_type(), "all_to_all_v: send is ",
              send.scalar_type(), ", receive is ", receive.scalar_type());
  check_input(send.device() == receive.device(), "all_to_all_v: send is on ", send.device(),
              ", receive is on ", receive.device());
  check_rows("send", sent_rows(transfer), transfer.send_rows, size);
  check_rows("receive", receive, transfer.receive_rows, size);
  check_input(send.sizes().slice(1) == receive.sizes().slice(1), "all_to_all_v: send has rows of ",
              send.sizes().slice(1), ", receive has rows of ", receive.sizes().slice(1));
  check_input(transfer.send_rows[rank] == transfer.receive_rows[rank], "all_to_all_v: rank ", rank,
              " sends itself ", transfer.send_rows[rank], " rows, but receives ",
              transfer.receive_rows[rank]);
  check_input(at::get_overlap_status(send, receive) == at::MemOverlapStatus::No,
              "all_to_all_v: send and receive overlap in memory");
}

/// Bytes of the rows for or from ranks other than `rank`.
int64_t bytes_elsewhere(const torch::Tensor& rows, const std::vector<int64_t>& rows_per_peer,
                        int rank) {
  const int64_t all = std::accumulate(rows_per_peer.begin(), rows_per_peer.end(), int64_t{0});
  return (all - rows_per_peer[rank]) * row_bytes(rows);
}

int64_t bytes_of(const torch::Tensor& tensor) { return static_cast<int64_t>(tensor.nbytes()); }

}  // namespace

void Communicator::all_to_all_v(const std::vector<Transfer>& transfers) {
  for (const Transfer& transfer : transfers) {
    check_transfer(transfer, rank_, size_, gathers_rows());
    check_device(transfer.send.device());
    check_input(transfer.send.device() == transfers.front().send.device(),
                "all_to_all_v: tensors on ", transfers.front().send.device(), " and on ",
                transfer.send.device());
  }
  const at::NoGradGuard no_grad;
  do_all_to_all_v(transfers);
  for (const Transfer& transfer : transfers) {
    traffic_.bytes_sent += bytes_elsewhere(transfer.send, transfer.send_rows, rank_);
    traffic_.bytes_received += bytes_elsewhere(transfer.receive, transfer.receive_rows, rank_);
  }
  ++traffic_.collectives;
}

void Communicator::all_reduce(torch::Tensor& tensor) {
  check_tensor("all_reduce", "tensor", tensor);
  const auto type = tensor.scalar_type();
  check_input(at::isFloatingType(type) || at::isIntegralType(type, /*includeBool=*/false),
              "all_reduce: cannot sum ", type);
  check_device(tensor.device());
  const at::NoGradGuard no_grad;
  do_all_reduce(tensor);
  // Every rank receives its chunk from all others and sends them the sum; and the reverse.
  const int64_t own = chunk_length(tensor.numel(), rank_, size_);
  const int64_t moved =
      (tensor.numel() - own + (size_ - 1) * own) * static_cast<int64_t>(tensor.element_size());
  traffic_.bytes_sent += moved;
  traffic_.bytes_received += moved;
  ++traffic_.collectives;
}

torch::Tensor Communicator::all_gather(const torch::Tensor& tensor) {
  check_tensor("all_gather", "tensor", tensor);
  check_device(tensor.device());
  int64_t gathered_bytes = 0;
  check_input(!__builtin_mul_overflow(bytes_of(tensor), int64_t{size_}, &gathered_bytes),
              "all_gather: ", size_, " times ", tensor.nbytes(), " bytes do not fit into 64 bits");
  std::vector<int64_t> sizes = tensor.sizes().vec();
  sizes.insert(sizes.begin(), size_);
  const at::NoGradGuard no_grad;
  torch::Tensor gathered = at::empty(sizes, tensor.options());
  do_all_gather(tensor, gathered);
  traffic_.bytes_sent += gathered_bytes - bytes_of(tensor);
  traffic_.bytes_received += gathered_bytes - bytes_of(tensor);
  ++traffic_.collectives;
  return gathered;
}

void Communicator::broadcast(torch::Tensor& tensor, int root) {
  check_tensor("broadcast", "tensor", tensor);
  check_input(root >= 0 && root < size_, "broadcast: root is ", root, ", expected 0 to ",
              size_ - 1);
  check_device(tensor.device());
  const at::NoGradGuard no_grad;
  do_broadcast(tensor, root);
  if (rank_ == root) {
    traffic_.bytes_sent += (size_ - 1) * bytes_of(tensor);
  } else {
    traffic_.bytes_received += bytes_of(tensor);
  }
  ++traffic_.collectives;
}

void Communicator::barrier() {
  do_barrier();
  ++traffic_.collectives;
}

}  // namespace anabranch
