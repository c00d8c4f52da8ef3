#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/aminmax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
#include <anabranch/communicator.h>

#include <algorithm>
#include <numeric>

#include "support/check.h"
#include "support/cuda/side_stream.h"
#include "support/sum.h"

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

void check_index(const Transfer& transfer) {
  const torch::Tensor& index = transfer.send_index;
  check_tensor("all_to_all_v", "send_index", index);
  check_input(index.dim() == 1 && index.scalar_type() == at::kLong &&
                  index.device() == transfer.send.device(),
              "all_to_all_v: send_index is ", index.scalar_type(), " of sizes ", index.sizes(),
              " on ", index.device(), ", expected one dimension of Long on ",
              transfer.send.device());
  if (index.is_cpu() && index.numel() > 0) {
    const auto [least, most] = at::aminmax(index);
    check_input(transfer.send.dim() >= 1 && least.item<int64_t>() >= 0 &&
                    most.item<int64_t>() < transfer.send.size(0),
                "all_to_all_v: send_index goes from ", least.item<int64_t>(), " to ",
                most.item<int64_t>(), ", but send is ", transfer.send.sizes());
  }
}

void check_transfer(const Transfer& transfer, int rank, int size) {
  const torch::Tensor& send = transfer.send;
  const torch::Tensor& receive = transfer.receive;
  check_tensor("all_to_all_v", "send", send);
  check_tensor("all_to_all_v", "receive", receive);
  if (transfer.send_index.defined()) {
    check_index(transfer);
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

/// The same with counts that the host has read.
Transfer with_known_counts(const Transfer& transfer) {
  const auto* sent = transfer.counts.const_data_ptr<int64_t>();
  const int64_t size = transfer.counts.size(1);
  Transfer known = transfer;
  known.counts.reset();
  known.send_rows.assign(sent, sent + size);
  known.receive_rows.assign(sent + size, sent + 2 * size);
  torch::Tensor& sent_tensor = known.send_index.defined() ? known.send_index : known.send;
  sent_tensor = sent_tensor.narrow(0, 0, sum(known.send_rows));
  known.receive = known.receive.narrow(0, 0, sum(known.receive_rows));
  return known;
}

void check_counts(const Transfer& transfer, const Communicator& communicator) {
  const auto& counts = transfer.counts;
  const auto device = transfer.send.device();
  const int64_t size = communicator.size();
  check_input(counts.sizes() == at::IntArrayRef({2, size}) && counts.scalar_type() == at::kLong &&
                  counts.is_contiguous() && counts.device() == device,
              "all_to_all_v: counts are ", counts.scalar_type(), " ", counts.sizes(), " on ",
              counts.device(), ", expected contiguous int64 [2, ", size, "] on ", device);
  check_input(transfer.send_rows.empty() && transfer.receive_rows.empty(),
              "all_to_all_v: counts beside send_rows or receive_rows");
  check_input(communicator.reads_counts_on(device), "all_to_all_v: counts on ", device, ", which ",
              communicator.name(), " does not read there");
}

/// Rows that travel on a stream beside the caller's.
class RowsBeside final : public Pending {
 public:
  explicit RowsBeside(const std::vector<Transfer>& transfers)
      : transfers_(transfers),
        beside_(transfers.empty() ? torch::kCPU : transfers.front().send.device()) {}

  template <typename Start>
  void start(const Start& start_rows) {
    beside_.run([&] {
      pending_ = start_rows();
      pending_->run_in_background();
    });
  }
  void finish() override {
    beside_.run([&] { pending_->finish(); });
    beside_.join();
  }

 private:
  std::vector<Transfer> transfers_;  ///< whose memory is in use until the streams have joined
  SideStream beside_;
  std::unique_ptr<Pending> pending_;
};

}  // namespace

std::unique_ptr<Pending> Communicator::start_rows(std::vector<Transfer> transfers) {
  for (Transfer& transfer : transfers) {
    if (transfer.counts.defined()) {
      check_counts(transfer, *this);
      if (transfer.send.is_cpu()) transfer = with_known_counts(transfer);
    }
    if (!transfer.counts.defined()) {
      check_transfer(transfer, rank_, size_);
    }
    check_device(transfer.send.device());
    check_input(transfer.send.device() == transfers.front().send.device(),
                "all_to_all_v: tensors on ", transfers.front().send.device(), " and on ",
                transfer.send.device());
  }
  const at::NoGradGuard no_grad;
  auto pending = do_all_to_all_v(std::move(transfers));
  ++traffic_.collectives;
  return pending;
}

void Communicator::all_to_all_v(const std::vector<Transfer>& transfers) {
  start_rows(transfers)->finish();
}

std::unique_ptr<Pending> Communicator::start_all_to_all_v(std::vector<Transfer> transfers) {
  auto pending = std::make_unique<RowsBeside>(transfers);
  pending->start([&] { return start_rows(std::move(transfers)); });
  return pending;
}

void Communicator::all_reduce(torch::Tensor& tensor) {
  check_tensor("all_reduce", "tensor", tensor);
  const auto type = tensor.scalar_type();
  check_input(at::isFloatingType(type) || at::isIntegralType(type, /*includeBool=*/false),
              "all_reduce: cannot sum ", type);
  check_device(tensor.device());
  const at::NoGradGuard no_grad;
  do_all_reduce(tensor);
  ++traffic_.collectives;
}

torch::Tensor Communicator::all_gather(const torch::Tensor& tensor) {
  check_tensor("all_gather", "tensor", tensor);
  check_device(tensor.device());
  int64_t gathered_bytes = 0;
  check_input(!__builtin_mul_overflow(static_cast<int64_t>(tensor.nbytes()), int64_t{size_},
                                      &gathered_bytes),
              "all_gather: ", size_, " times ", tensor.nbytes(), " bytes do not fit into 64 bits");
  std::vector<int64_t> sizes = tensor.sizes().vec();
  sizes.insert(sizes.begin(), size_);
  const at::NoGradGuard no_grad;
  torch::Tensor gathered = at::empty(sizes, tensor.options());
  do_all_gather(tensor, gathered);
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
  ++traffic_.collectives;
}

void Communicator::barrier() {
  do_barrier();
  ++traffic_.collectives;
}

std::shared_ptr<Communicator> Communicator::split(int color, int key) {
  const torch::Tensor all = at::empty({size_, 2}, at::kInt);
  gather(Collective::kSplit, at::tensor({color, key}, at::kInt), all);
  const auto asked = all.accessor<int, 2>();
  std::vector<int> members;
  for (int rank = 0; rank < size_; ++rank) {
    if (asked[rank][0] == color) {
      members.push_back(rank);
    }
  }
  std::stable_sort(members.begin(), members.end(),
                   [&](int left, int right) { return asked[left][1] < asked[right][1]; });
  const auto self = std::find(members.begin(), members.end(), rank_);
  return regroup(members, static_cast<int>(self - members.begin()));
}

void Communicator::count(int64_t bytes_sent, int64_t bytes_received) {
  traffic_.bytes_sent += bytes_sent;
  traffic_.bytes_received += bytes_received;
}

std::unique_ptr<Pending> Communicator::start_counted(Collective call, Messages messages) {
  const auto add = [](int64_t bytes, const Message& message) { return bytes + message.bytes; };
  count(std::accumulate(messages.outgoing.begin(), messages.outgoing.end(), int64_t{0}, add),
        std::accumulate(messages.incoming.begin(), messages.incoming.end(), int64_t{0}, add));
  return start(call, std::move(messages));
}

}  // namespace anabranch
