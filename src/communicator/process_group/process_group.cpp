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

#include "communicator/done.h"
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
  /// NCCL's calls have no tags.
  SplitOrder split_order(torch::Device device) const override {
    return group_->carrier(device).is_cpu() ? SplitOrder::kAny : SplitOrder::kOne;
  }

 protected:
  std::unique_ptr<Pending> start(Collective call, Messages messages) override;
  std::shared_ptr<Communicator> regroup(const std::vector<int>& members, int rank) override;
  void check_device(torch::Device device) const override {
    check_input(device.is_cpu() || (device.is_cuda() && (!group_->gpu || device == *group_->gpu)),
                "process_group: tensor on ", device, ", expected ",
                group_->gpu ? c10::str(*group_->gpu) : "a GPU's", " or host memory");
  }

 private:
  using Work = c10::intrusive_ptr<c10d::Work>;
  class OnGpu;
  class OnHost;
  class Staged;
  std::unique_ptr<Pending> start_reached(Collective call, Messages messages);
  template <typename Action>
  auto checked_on_gpu(Collective call, const Action& action) const;
  Work send(Collective call, const Message& message);
  Work receive(Collective call, const Message& message);

  std::shared_ptr<Group> group_;
  std::vector<int> members_;
  int number_;
  CommunicatorOptions options_;
};

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

/// What `action` returns, whose failure is that of the call.
template <typename Action>
auto ProcessGroupCommunicator::checked_on_gpu(Collective call, const Action& action) const {
  try {
    return action();
  } catch (const std::exception& error) {
    throw CommunicationError(
        c10::str("rank ", rank(), ": ", name_of(call), " failed: ", error.what()), {});
  }
}

/// Messages between GPUs' memories, on a stream of the group's.
class ProcessGroupCommunicator::OnGpu final : public Pending {
 public:
  OnGpu(ProcessGroupCommunicator& communicator, Collective call, Messages messages)
      : communicator_(communicator), call_(call), messages_(std::move(messages)) {
    communicator_.check();
    work_ = communicator_.checked_on_gpu(call_, [&] {
      Coalescing together(*communicator_.group_->process_group, torch::kCUDA);
      for (const Message& message : messages_.incoming) {
        communicator_.receive(call_, message);
      }
      for (const Message& message : messages_.outgoing) {
        communicator_.send(call_, message);
      }
      return together.end();
    });
  }
  void finish() override {
    communicator_.checked_on_gpu(call_,
                                 [&] { return work_->wait(); });  // orders the current stream
  }

 private:
  ProcessGroupCommunicator& communicator_;
  Collective call_;
  Messages messages_;
  Work work_;
};

/// Messages between host memories, which the group's threads move.
class ProcessGroupCommunicator::OnHost final : public Pending {
 public:
  OnHost(ProcessGroupCommunicator& communicator, Collective call, Messages messages)
      : communicator_(communicator), call_(call), messages_(std::move(messages)) {
    for (const Message& message : messages_.incoming) {
      try_with(message.peer,
               [&] { works_.emplace_back(message.peer, communicator_.receive(call_, message)); });
    }
    for (const Message& message : messages_.outgoing) {
      try_with(message.peer,
               [&] { works_.emplace_back(message.peer, communicator_.send(call_, message)); });
    }
  }

  void finish() override {
    const auto end = Clock::now() + communicator_.options_.deadline;
    for (const auto& [peer, work] : works_) {
      try_with(peer, [&, &work = work] {
        const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(end - Clock::now());
        check_input(work->wait(std::max(left, std::chrono::milliseconds(1))), "it was aborted");
      });
    }
    if (failure_) {
      throw *failure_;
    }
  }

 private:
  /// What fails with one rank is thrown when the others have what they wait for: else they would wait for
  /// this rank until their deadline, and name it instead.
  template <typename Action>
  void try_with(int peer, const Action& action) {
    try {
      action();
    } catch (const std::exception& error) {
      if (!failure_) {
        failure_.emplace(waited_in_vain(communicator_.rank(), call_, communicator_.options_, peer,
                                        error.what()));
      }
    }
  }

  ProcessGroupCommunicator& communicator_;
  Collective call_;
  Messages messages_;
  std::vector<std::pair<int, Work>> works_;
  std::optional<CommunicationError> failure_;
};

/// Messages in a memory that the group moves, in the place of others.
class ProcessGroupCommunicator::Staged final : public Pending {
 public:
  Staged(ProcessGroupCommunicator& communicator, Collective call, Messages messages,
         torch::Device carrier)
      : staged_(std::move(messages), at::TensorOptions(carrier)),
        pending_(communicator.start_reached(call, staged_.messages())) {}
  void finish() override {
    pending_->finish();
    staged_.bring_back();
  }

 private:
  StagedMessages staged_;
  std::unique_ptr<Pending> pending_;
};

std::unique_ptr<Pending> ProcessGroupCommunicator::start(Collective call, Messages messages) {
  const torch::Device carrier = group_->carrier(messages.device);
  if (carrier != messages.device) {
    return std::make_unique<Staged>(*this, call, std::move(messages), carrier);
  }
  return start_reached(call, std::move(messages));
}

std::unique_ptr<Pending> ProcessGroupCommunicator::start_reached(Collective call,
                                                                 Messages messages) {
  if (messages.outgoing.empty() && messages.incoming.empty()) {
    return std::make_unique<Done>();
  }
  if (messages.device.is_cpu()) {
    return std::make_unique<OnHost>(*this, call, std::move(messages));
  }
  return std::make_unique<OnGpu>(*this, call, std::move(messages));
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
