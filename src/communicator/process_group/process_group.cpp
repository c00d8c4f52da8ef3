#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
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
#include <utility>

#include "communicator/errors.h"
#include "communicator/process_group/coalescing.h"
#include "communicator/staged_messages.h"
#include "support/check.h"

namespace anabranch {
namespace {

using Clock = std::chrono::steady_clock;

// Tags are shared with the program that has the group: these have a bit that it hardly uses. Behind it
// stands which communicator's the messages are, then what they are: of ranks that make other calls, or
// with other sizes, none is taken for what it is not, but for missing. (gloo ends the process where more
// bytes come than are expected.)
constexpr int kPrivateTags = 1 << 30;
constexpr int kKindBits = 16;
constexpr int kMostCommunicators = 1 << (30 - kKindBits);
/// The one whose messages make all others known.
constexpr int kMeeting = 0;

/// Each communicator of this process over a process group has a number of its own, the same on all of its
/// ranks.
std::atomic<int> last_number = kMeeting;

int tag_of(int number, Collective call, int64_t bytes) {
  const auto kind = static_cast<uint64_t>(bytes) * 8 + static_cast<uint64_t>(call);
  const uint64_t spread = kind * 0x9e3779b97f4a7c15 >> (64 - kKindBits);
  return kPrivateTags + number * (1 << kKindBits) + static_cast<int>(spread);
}

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
                           int number, CommunicatorOptions options)
      : Communicator(rank, static_cast<int>(members.size())),
        group_(std::move(group)),
        members_(std::move(members)),
        number_(number),
        options_(options) {}

  std::string name() const override { return "process_group"; }
  void check() override;

 protected:
  void exchange(Collective call, const Messages& messages,
                const std::function<void()>& meanwhile) override;
  std::shared_ptr<Communicator> regroup(const std::vector<int>& members, int rank) override;
  void check_device(torch::Device device) const override {
    check_input(device.is_cpu() || (device.is_cuda() && (!group_->gpu || device == *group_->gpu)),
                "process_group: tensor on ", device, ", expected ",
                group_->gpu ? c10::str(*group_->gpu) : "a GPU's", " or host memory");
  }

 private:
  using Work = c10::intrusive_ptr<c10d::Work>;
  void exchange_on_gpu(Collective call, const Messages& messages,
                       const std::function<void()>& meanwhile);
  void exchange_on_host(Collective call, const Messages& messages,
                        const std::function<void()>& meanwhile);
  Work send(Collective call, const Message& message);
  Work receive(Collective call, const Message& message);

  std::shared_ptr<Group> group_;
  std::vector<int> members_;
  int number_;
  CommunicatorOptions options_;
};

void ProcessGroupCommunicator::exchange(Collective call, const Messages& messages,
                                        const std::function<void()>& meanwhile) {
  const torch::Device carrier = group_->carrier(messages.device);
  std::optional<StagedMessages> staged;
  if (carrier != messages.device) {
    staged.emplace(messages, at::TensorOptions(carrier));
  }
  const Messages& reached = staged ? staged->messages() : messages;
  if (reached.outgoing.empty() && reached.incoming.empty()) {
    meanwhile();
  } else if (carrier.is_cpu()) {
    exchange_on_host(call, reached, meanwhile);
  } else {
    exchange_on_gpu(call, reached, meanwhile);
  }
  if (staged) {
    staged->bring_back();
  }
}

std::vector<at::Tensor> bytes_of(const Message& message) {
  return {message.tensor.view({-1}).view(at::kByte).narrow(0, message.begin, message.bytes)};
}

ProcessGroupCommunicator::Work ProcessGroupCommunicator::send(Collective call,
                                                              const Message& message) {
  auto bytes = bytes_of(message);
  return group_->process_group->send(bytes, members_[message.peer],
                                     tag_of(number_, call, message.bytes));
}

ProcessGroupCommunicator::Work ProcessGroupCommunicator::receive(Collective call,
                                                                 const Message& message) {
  auto bytes = bytes_of(message);
  return group_->process_group->recv(bytes, members_[message.peer],
                                     tag_of(number_, call, message.bytes));
}

void ProcessGroupCommunicator::exchange_on_gpu(Collective call, const Messages& messages,
                                               const std::function<void()>& meanwhile) {
  check();
  try {
    Coalescing together(*group_->process_group, torch::kCUDA);
    for (const Message& message : messages.incoming) {
      receive(call, message);
    }
    for (const Message& message : messages.outgoing) {
      send(call, message);
    }
    const Work work = together.end();
    meanwhile();
    work->wait();  // orders the current stream
  } catch (const std::exception& error) {
    throw CommunicationError(
        c10::str("rank ", rank(), ": ", name_of(call), " failed: ", error.what()), {});
  }
}

void ProcessGroupCommunicator::exchange_on_host(Collective call, const Messages& messages,
                                                const std::function<void()>& meanwhile) {
  const auto end = Clock::now() + options_.deadline;
  std::optional<CommunicationError> failure;
  // What fails with one rank is thrown when the others have what they wait for: else they would wait for
  // this rank until their deadline, and name it instead.
  const auto try_with = [&](int peer, const auto& action) {
    try {
      action();
    } catch (const std::exception& error) {
      if (!failure) {
        failure.emplace(waited_in_vain(rank(), call, options_, peer, error.what()));
      }
    }
  };
  std::vector<std::pair<int, Work>> pending;
  for (const Message& message : messages.incoming) {
    try_with(message.peer, [&] { pending.emplace_back(message.peer, receive(call, message)); });
  }
  for (const Message& message : messages.outgoing) {
    try_with(message.peer, [&] { pending.emplace_back(message.peer, send(call, message)); });
  }
  meanwhile();
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

std::shared_ptr<Communicator> ProcessGroupCommunicator::regroup(const std::vector<int>& members,
                                                                int rank) {
  const torch::Tensor last = at::empty({size()}, at::kInt);
  gather(Collective::kSplit, at::scalar_tensor(last_number.load(), at::kInt), last);
  const int number = last.max().item<int>() + 1;
  last_number = number;
  if (number >= kMostCommunicators) {
    throw std::runtime_error(c10::str("split: a process group's tags suffice for ",
                                      kMostCommunicators - 1, " communicators"));
  }
  std::vector<int> of_group;
  for (const int member : members) {
    of_group.push_back(members_[member]);
  }
  return std::make_shared<ProcessGroupCommunicator>(group_, std::move(of_group), rank, number,
                                                    options_);
}

}  // namespace

std::shared_ptr<Communicator> make_process_group_communicator(
    c10::intrusive_ptr<c10d::ProcessGroup> group, const CommunicatorOptions& options) {
  check_input(group != nullptr, "make_process_group_communicator: no process group");
  check_options("make_process_group_communicator", options);
  std::vector<int> members(group->getSize());
  std::iota(members.begin(), members.end(), 0);
  const int rank = group->getRank();
  ProcessGroupCommunicator meeting(std::make_shared<Group>(std::move(group)), std::move(members),
                                   rank, kMeeting, options);
  return meeting.split(/*color=*/0, /*key=*/0);
}

}  // namespace anabranch
