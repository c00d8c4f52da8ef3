#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <anabranch/error.h>
#include <anabranch/process_group.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <numeric>
#include <optional>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <tuple>
#include <utility>

#include "communicator/chunks.h"
#include "communicator/waiting_time.h"
#include "support/check.h"

namespace anabranch {
namespace {

using Clock = std::chrono::steady_clock;

/// Rows for or from one rank of a communicator.
struct Message {
  int peer;
  torch::Tensor rows;
};

/// A process group, and what all communicators over it share.
struct Group {
  explicit Group(c10::intrusive_ptr<c10d::ProcessGroup> process_group);

  /// The memory in which the group moves tensors of `device`: theirs if it can.
  torch::Device carrier(torch::Device device) const {
    if (device.is_cpu()) {
      return host ? device : *gpu;
    }
    return gpu ? device : torch::Device(torch::kCPU);
  }

  c10::intrusive_ptr<c10d::ProcessGroup> process_group;
  bool host = false;                 ///< a backend moves host memory
  std::optional<torch::Device> gpu;  ///< a backend moves this GPU's memory, on its streams
  std::atomic<int> last_tag{0};      ///< each communicator's messages have a tag of their own
};

Group::Group(c10::intrusive_ptr<c10d::ProcessGroup> process_group_)
    : process_group(std::move(process_group_)) {
  for (const torch::Device device : process_group->getDeviceTypes()) {
    host = host || device.is_cpu();
    // Sends and receives of GPU memory that must start together are NCCL's: gloo has none.
    if (device.is_cuda() && process_group->getBackend(device.type())->supportsCoalescing()) {
      gpu = process_group->getBoundDeviceId().value_or(
          c10::impl::VirtualGuardImpl(torch::kCUDA).getDevice());
    }
  }
  check_input(host || gpu,
              "make_process_group_communicator: the group has no backend for the CPU, and none for "
              "CUDA");
  if (gpu) {
    // NCCL ties the ranks in the first call, for which all of them must come.
    std::vector<at::Tensor> token = {at::zeros({1}, at::TensorOptions(*gpu).dtype(at::kByte))};
    process_group->allreduce(token)->wait();
  }
}

/// Sends and receives between `members` of a group, which are its ranks.
class ProcessGroupCommunicator final : public Communicator {
 public:
  ProcessGroupCommunicator(std::shared_ptr<Group> group, std::vector<int> members, int rank,
                           int tag, CommunicatorOptions options)
      : Communicator(rank, static_cast<int>(members.size())),
        group_(std::move(group)),
        members_(std::move(members)),
        tag_(tag),
        options_(options) {}

  std::string name() const override { return "process_group"; }
  std::shared_ptr<Communicator> split(int color, int key) override;
  void check() override;

 protected:
  void do_all_to_all_v(const std::vector<Transfer>& transfers) override {
    all_to_all_v("all_to_all_v", transfers);
  }
  void do_all_reduce(torch::Tensor& tensor) override;
  void do_all_gather(const torch::Tensor& tensor, torch::Tensor& gathered) override {
    gather("all_gather", tensor, gathered);
  }
  void do_broadcast(torch::Tensor& tensor, int root) override;
  void do_barrier() override {
    gather("barrier", at::zeros({1}, at::kByte), at::empty({size(), 1}, at::kByte));
    check();
  }
  void check_device(torch::Device device) const override {
    check_input(device.is_cpu() || (device.is_cuda() && (!group_->gpu || device == *group_->gpu)),
                "process_group: tensor on ", device, ", expected ",
                group_->gpu ? c10::str(*group_->gpu) : "a GPU's", " or host memory");
  }

 private:
  void all_to_all_v(const char* call, const std::vector<Transfer>& transfers);
  void gather(const char* call, const torch::Tensor& tensor, const torch::Tensor& gathered);
  void exchange(const char* call, const std::vector<Message>& outgoing,
                const std::vector<Message>& incoming);
  void exchange_on_gpu(const char* call, const std::vector<Message>& outgoing,
                       const std::vector<Message>& incoming);
  void exchange_on_host(const char* call, const std::vector<Message>& outgoing,
                        const std::vector<Message>& incoming);
  c10::intrusive_ptr<c10d::Work> send(const Message& message);
  c10::intrusive_ptr<c10d::Work> receive(const Message& message);
  /// The rank at distance `step`: every rank begins with another one.
  int peer_at(int step) const { return (rank() + step) % size(); }

  std::shared_ptr<Group> group_;
  std::vector<int> members_;
  int tag_;
  CommunicatorOptions options_;
};

/// `tensor` in the memory of `device`: itself if it is there.
torch::Tensor carried(const torch::Tensor& tensor, torch::Device device) {
  return tensor.to(device).contiguous();
}

void ProcessGroupCommunicator::all_to_all_v(const char* call,
                                            const std::vector<Transfer>& transfers) {
  std::vector<Message> outgoing;
  std::vector<Message> incoming;
  std::vector<torch::Tensor> received;
  for (const Transfer& transfer : transfers) {
    const torch::Device carrier = group_->carrier(transfer.send.device());
    const bool in_place = carrier == transfer.receive.device();
    received.push_back(in_place ? transfer.receive
                                : at::empty_like(transfer.receive, at::TensorOptions(carrier)));
    const auto sent = carried(transfer.send, carrier).split_with_sizes(transfer.send_rows);
    const auto places = received.back().split_with_sizes(transfer.receive_rows);
    places[rank()].copy_(sent[rank()]);
    for (int step = 1; step < size(); ++step) {
      outgoing.push_back({peer_at(step), sent[peer_at(step)]});
      incoming.push_back({peer_at(step), places[peer_at(step)]});
    }
  }
  exchange(call, outgoing, incoming);
  for (size_t i = 0; i < transfers.size(); ++i) {
    if (!received[i].is_same(transfers[i].receive)) {
      transfers[i].receive.copy_(received[i]);
    }
  }
}

/// Every rank sums one chunk in rank order, in fp32 for 16-bit types, and hands it to all.
void ProcessGroupCommunicator::do_all_reduce(torch::Tensor& tensor) {
  std::vector<int64_t> lengths;
  for (int peer = 0; peer < size(); ++peer) {
    lengths.push_back(chunk_length(tensor.numel(), peer, size()));
  }
  const std::vector<int64_t> own(size(), lengths[rank()]);
  const torch::Tensor flat = tensor.view({-1});
  const torch::Tensor terms = at::empty({size() * own[0]}, tensor.options());
  all_to_all_v("all_reduce", {{flat, lengths, terms, own}});
  const auto parts = terms.split_with_sizes(own);
  torch::Tensor sum = parts[0].to(at::toOpMathType(tensor.scalar_type()));
  for (int peer = 1; peer < size(); ++peer) {
    sum.add_(parts[peer]);
  }
  const torch::Tensor sums = sum.to(tensor.scalar_type()).repeat({size()});
  all_to_all_v("all_reduce", {{sums, own, flat, lengths}});
}

void ProcessGroupCommunicator::gather(const char* call, const torch::Tensor& tensor,
                                      const torch::Tensor& gathered) {
  const torch::Device carrier = group_->carrier(tensor.device());
  const torch::Tensor sent = carried(tensor, carrier);
  const torch::Tensor places =
      carrier == tensor.device() ? gathered : at::empty_like(gathered, at::TensorOptions(carrier));
  std::vector<Message> outgoing;
  std::vector<Message> incoming;
  places[rank()].copy_(sent);
  for (int step = 1; step < size(); ++step) {
    outgoing.push_back({peer_at(step), sent});
    incoming.push_back({peer_at(step), places[peer_at(step)]});
  }
  exchange(call, outgoing, incoming);
  if (!places.is_same(gathered)) {
    gathered.copy_(places);
  }
}

void ProcessGroupCommunicator::do_broadcast(torch::Tensor& tensor, int root) {
  const torch::Tensor place = carried(tensor, group_->carrier(tensor.device()));
  std::vector<Message> outgoing;
  for (int step = 1; rank() == root && step < size(); ++step) {
    outgoing.push_back({peer_at(step), place});
  }
  if (rank() == root) {
    exchange("broadcast", outgoing, {});
  } else {
    exchange("broadcast", {}, {{root, place}});
  }
  if (rank() != root && !place.is_same(tensor)) {
    tensor.copy_(place);
  }
}

/// Without the messages that hold nothing, on both sides alike; all of one memory.
std::vector<Message> as_bytes(const std::vector<Message>& messages) {
  std::vector<Message> filled;
  for (const Message& message : messages) {
    if (message.rows.nbytes() > 0) {
      filled.push_back({message.peer, message.rows.view({-1}).view(at::kByte)});
    }
  }
  return filled;
}

void ProcessGroupCommunicator::exchange(const char* call, const std::vector<Message>& outgoing,
                                        const std::vector<Message>& incoming) {
  const std::vector<Message> sent = as_bytes(outgoing);
  const std::vector<Message> received = as_bytes(incoming);
  if (sent.empty() && received.empty()) {
    return;
  }
  const Message& any = sent.empty() ? received.front() : sent.front();
  if (any.rows.is_cpu()) {
    exchange_on_host(call, sent, received);
  } else {
    exchange_on_gpu(call, sent, received);
  }
}

c10::intrusive_ptr<c10d::Work> ProcessGroupCommunicator::send(const Message& message) {
  std::vector<at::Tensor> tensors = {message.rows};
  return group_->process_group->send(tensors, members_[message.peer], tag_);
}

c10::intrusive_ptr<c10d::Work> ProcessGroupCommunicator::receive(const Message& message) {
  std::vector<at::Tensor> tensors = {message.rows};
  return group_->process_group->recv(tensors, members_[message.peer], tag_);
}

void ProcessGroupCommunicator::exchange_on_gpu(const char* call,
                                               const std::vector<Message>& outgoing,
                                               const std::vector<Message>& incoming) {
  check();
  try {
    group_->process_group->startCoalescing(torch::kCUDA);
    for (const Message& message : incoming) {
      receive(message);
    }
    for (const Message& message : outgoing) {
      send(message);
    }
    group_->process_group->endCoalescing(torch::kCUDA)->wait();  // orders the current stream
  } catch (const std::exception& error) {
    throw CommunicationError(c10::str("rank ", rank(), ": ", call, " failed: ", error.what()), {});
  }
}

void ProcessGroupCommunicator::exchange_on_host(const char* call,
                                                const std::vector<Message>& outgoing,
                                                const std::vector<Message>& incoming) {
  const auto end = Clock::now() + options_.deadline;
  std::optional<CommunicationError> failure;
  // What fails with one rank is thrown when the others have what they wait for: else they would wait for
  // this rank until their deadline, and name it instead.
  const auto try_with = [&](int peer, const auto& action) {
    try {
      action();
    } catch (const std::exception& error) {
      if (!failure) {
        failure.emplace(c10::str("rank ", rank(), ": ", call, " waited up to ",
                                 in_seconds(options_.deadline), " for rank ", peer,
                                 " (dead, stalled, or not making the call): ", error.what()),
                        std::vector<int>{peer});
      }
    }
  };
  std::vector<std::pair<int, c10::intrusive_ptr<c10d::Work>>> pending;
  for (const Message& message : incoming) {
    try_with(message.peer, [&] { pending.emplace_back(message.peer, receive(message)); });
  }
  for (const Message& message : outgoing) {
    try_with(message.peer, [&] { pending.emplace_back(message.peer, send(message)); });
  }
  for (const auto& [peer, work] : pending) {
    try_with(peer, [&, &work = work] {
      const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(end - Clock::now());
      check_input(work->wait(std::max(left, std::chrono::milliseconds(1))), "it was aborted");
    });
  }
  if (failure) {
    throw *failure;
  }
}

/// The error of a backend that watches its collectives; not all of LibTorch's versions ask it so.
template <typename Backend>
int error_of(Backend& backend) {
  if constexpr (requires { backend.getError(); }) {
    return static_cast<int>(backend.getError());
  } else {
    return 0;
  }
}

void ProcessGroupCommunicator::check() {
  if (group_->gpu) {
    const int error = error_of(*group_->process_group->getBackend(torch::kCUDA));
    if (error != 0) {
      throw CommunicationError(
          c10::str("rank ", rank(), ": a collective of the process group '",
                   group_->process_group->getGroupName(), "' ",
                   error == 1 ? "took longer than the group's timeout" : "failed",
                   " on the GPU; torch's log says more"),
          {});
    }
  }
}

std::shared_ptr<Communicator> ProcessGroupCommunicator::split(int color, int key) {
  const torch::Tensor all = at::empty({size(), 3}, at::kInt);
  gather("split", at::tensor({color, key, group_->last_tag.load()}, at::kInt), all);
  const auto ranks = all.accessor<int, 2>();
  std::vector<std::tuple<int, int>> order;  // key, rank
  int tag = 0;
  for (int r = 0; r < size(); ++r) {
    tag = std::max(tag, ranks[r][2] + 1);
    if (ranks[r][0] == color) {
      order.emplace_back(ranks[r][1], r);
    }
  }
  std::sort(order.begin(), order.end());
  std::vector<int> members;
  int own = 0;
  for (const auto& [unused, r] : order) {
    own = r == rank() ? static_cast<int>(members.size()) : own;
    members.push_back(members_[r]);
  }
  group_->last_tag = tag;
  return std::make_shared<ProcessGroupCommunicator>(group_, std::move(members), own, tag, options_);
}

}  // namespace

std::shared_ptr<Communicator> make_process_group_communicator(
    c10::intrusive_ptr<c10d::ProcessGroup> group, const CommunicatorOptions& options) {
  check_input(group != nullptr, "make_process_group_communicator: no process group");
  check_input(options.deadline.count() > 0, "make_process_group_communicator: the deadline is ",
              options.deadline.count(), " ms, expected more than 0");
  std::vector<int> members(group->getSize());
  std::iota(members.begin(), members.end(), 0);
  const int rank = group->getRank();
  return std::make_shared<ProcessGroupCommunicator>(std::make_shared<Group>(std::move(group)),
                                                    std::move(members), rank, /*tag=*/0, options);
}

}  // namespace anabranch
