// Every collective by the exchange of messages alone, as all transports have them that know of nothing
// faster.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <anabranch/communicator.h>

#include <numeric>

#include "communicator/sum.h"
#include "communicator/transfer_rows.h"
#include "support/cuda/side_stream.h"

namespace anabranch {
namespace {

void add(std::vector<Message>& messages, int peer, const torch::Tensor& tensor, int64_t begin,
         int64_t bytes) {
  if (bytes > 0) {
    messages.push_back({peer, tensor, begin, bytes});
  }
}

int64_t bytes_of(const torch::Tensor& tensor) { return static_cast<int64_t>(tensor.nbytes()); }

/// The `step`th rank to exchange with: every rank begins with another one.
int peer_at(int step, const Communicator& communicator) {
  return (communicator.rank() + step) % communicator.size();
}

/// The rows as they are sent, gathered from where the index says; but for this rank's own, whose places
/// are left as they are.
torch::Tensor rows_for_others(const Transfer& transfer, int rank) {
  if (!transfer.send_index.defined()) {
    return transfer.send;
  }
  const auto begin = row_offsets(transfer.send_rows);
  const torch::Tensor rows = empty_rows(begin.back(), transfer.send);
  take_sent_rows(transfer, 0, rows.narrow(0, 0, begin[rank]));
  take_sent_rows(transfer, begin[rank + 1],
                 rows.narrow(0, begin[rank + 1], begin.back() - begin[rank + 1]));
  return rows;
}

void take_own_rows(const Transfer& transfer, int rank) {
  const auto to = row_offsets(transfer.receive_rows);
  take_sent_rows(transfer, row_offsets(transfer.send_rows)[rank],
                 transfer.receive.narrow(0, to[rank], transfer.receive_rows[rank]));
}

/// Messages under way, and this rank's own rows, which are taken beside them.
class MovingRows final : public Pending {
 public:
  MovingRows(std::vector<Transfer> transfers, torch::Device device)
      : transfers_(std::move(transfers)), beside_(device) {}

  /// Launched when the messages are under way, which then have the multiprocessors that they need.
  void take_own_rows_beside(std::unique_ptr<Pending> messages, int rank) {
    messages_ = std::move(messages);
    beside_.run([&] {
      for (const Transfer& transfer : transfers_) {
        take_own_rows(transfer, rank);
      }
    });
  }
  void finish() override {
    messages_->finish();
    beside_.join();
  }
  void run_in_background() override { messages_->run_in_background(); }

 private:
  std::vector<Transfer> transfers_;
  SideStream beside_;
  std::unique_ptr<Pending> messages_;
};

}  // namespace

std::unique_ptr<Pending> Communicator::do_all_to_all_v(std::vector<Transfer> transfers) {
  Messages messages{transfers.empty() ? torch::kCPU : transfers.front().send.device()};
  auto moving = std::make_unique<MovingRows>(transfers, messages.device);
  for (const Transfer& transfer : transfers) {
    const torch::Tensor sent = rows_for_others(transfer, rank());
    const auto from = row_offsets(transfer.send_rows);
    const auto to = row_offsets(transfer.receive_rows);
    const int64_t bytes = row_bytes(transfer.send);
    for (int step = 1; step < size(); ++step) {
      const int peer = peer_at(step, *this);
      add(messages.outgoing, peer, sent, from[peer] * bytes, transfer.send_rows[peer] * bytes);
      add(messages.incoming, peer, transfer.receive, to[peer] * bytes,
          transfer.receive_rows[peer] * bytes);
    }
  }
  moving->take_own_rows_beside(start_counted(Collective::kAllToAllV, std::move(messages)), rank());
  return moving;
}

void Communicator::do_all_reduce(torch::Tensor& tensor) {
  if (size() == 1) {
    return;
  }
  std::vector<int> all(size());
  std::iota(all.begin(), all.end(), 0);
  sum_in_levels(tensor, rank(), {all}, [&](const Messages& messages) {
    start_counted(Collective::kAllReduce, messages)->finish();
  });
}

void Communicator::gather(Collective call, const torch::Tensor& tensor,
                          const torch::Tensor& gathered) {
  Messages messages{tensor.device()};
  for (int step = 1; step < size(); ++step) {
    const int peer = peer_at(step, *this);
    add(messages.outgoing, peer, tensor, 0, bytes_of(tensor));
    add(messages.incoming, peer, gathered, peer * bytes_of(tensor), bytes_of(tensor));
  }
  const auto pending = start_counted(call, std::move(messages));
  gathered[rank()].copy_(tensor);
  pending->finish();
}

void Communicator::do_all_gather(const torch::Tensor& tensor, torch::Tensor& gathered) {
  gather(Collective::kAllGather, tensor, gathered);
}

void Communicator::do_broadcast(torch::Tensor& tensor, int root) {
  Messages messages{tensor.device()};
  if (rank() != root) {
    add(messages.incoming, root, tensor, 0, bytes_of(tensor));
  }
  for (int step = 1; rank() == root && step < size(); ++step) {
    add(messages.outgoing, peer_at(step, *this), tensor, 0, bytes_of(tensor));
  }
  start_counted(Collective::kBroadcast, std::move(messages))->finish();
}

void Communicator::do_barrier() {
  gather(Collective::kBarrier, at::zeros({1}, at::kByte), at::empty({size(), 1}, at::kByte));
  check();
}

}  // namespace anabranch
