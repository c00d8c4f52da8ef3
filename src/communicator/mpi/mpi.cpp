#include "communicator/mpi/mpi.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <anabranch/error.h>
#include <anabranch/rank_discovery.h>

#include <atomic>
#include <exception>
#include <numeric>
#include <optional>
#include <utility>

#include "communicator/agreement.h"
#include "communicator/errors.h"
#include "communicator/mpi/messages.h"
#include "communicator/mpi/progress.h"
#include "communicator/mpi/watch.h"
#include "communicator/staged_messages.h"
#include "support/check.h"
#include "support/cuda/stream.h"

namespace anabranch {
namespace {

// A tag holds the group's id, the low bits of the call's number in the group, and the kind of call:
// messages of calls close to each other are never mixed up. Tag 0 is for notices.
constexpr int kCallKinds = 8;
constexpr int kCallNumbers = 16;
constexpr int kTagsPerGroup = kCallKinds * kCallNumbers;
constexpr int kWorldGroup = 1;

int tag_of(const MpiCallId& call) {
  return call.group * kTagsPerGroup + static_cast<int>(call.sequence % kCallNumbers) * kCallKinds +
         static_cast<int>(call.collective);
}

/// Every wait is for messages between pairs of ranks, so for ranks that can be named.
class MpiCommunicator final : public Communicator {
 public:
  MpiCommunicator(MpiRuntime& runtime, MpiGroup group, int rank, CommunicatorOptions options,
                  int64_t piece_bytes)
      : Communicator(rank, static_cast<int>(group.members.size())),
        runtime_(runtime),
        group_(std::move(group)),
        options_(options),
        piece_bytes_(piece_bytes) {}

  std::string name() const override { return "mpi"; }

 protected:
  std::unique_ptr<Pending> start(Collective call, Messages messages) override;
  std::shared_ptr<Communicator> regroup(const std::vector<int>& members, int rank) override;
  void check_device(torch::Device device) const override {
    check_input(device.is_cpu() || device.is_cuda(),
                "the mpi communicator moves tensors in host or GPU memory, not on ", device);
  }

 private:
  class UnderWay;

  MpiRuntime& runtime_;
  MpiGroup group_;
  CommunicatorOptions options_;
  int64_t piece_bytes_;
  int64_t calls_ = 0;
};

/// Messages of one call. MPI moves them while somebody calls it: whoever waits, or the runtime's thread. In
/// the background they are sent when those of the exchanges before have been, which are needed sooner: MPI
/// would let them share the way.
class MpiCommunicator::UnderWay final : public Pending, private MpiProgress::Task {
 public:
  UnderWay(MpiCommunicator& communicator, Collective call, Messages messages)
      : communicator_(communicator), call_{communicator.group_.id, call, ++communicator.calls_} {
    if (!messages.device.is_cpu() && !mpi_is_cuda_aware()) {
      staged_.emplace(std::move(messages), at::TensorOptions(at::kCPU).pinned_memory(true));
      messages = staged_->messages();
    }
    for (auto* list : {&messages.outgoing, &messages.incoming}) {
      for (Message& message : *list) {
        message.peer = communicator_.group_.members[message.peer];
      }
    }
    wait_for_stream(messages.device);  // MPI does not know streams
    messages_.emplace(communicator_.runtime_, std::move(messages));
    checked([&] {
      messages_->receive(tag_of(call_), communicator_.piece_bytes_);
      if (!communicator_.runtime_.has_background()) {
        send();
      }
    });
  }
  ~UnderWay() override {
    if (progress_ != nullptr) {
      progress_->remove(*this);
    }
  }

  void run_in_background() override {
    progress_ = communicator_.runtime_.progress();
    if (progress_ != nullptr) {
      progress_->add(*this);
    }
  }
  void finish() override {
    if (progress_ != nullptr) {
      progress_->take(*this);
    }
    MpiWatch watch = make_watch();
    checked([&] {
      if (failure_) {
        std::rethrow_exception(failure_);
      }
      send();
      while (!messages_->poll()) {
        watch.keep_waiting([&] { return messages_->pending(); });
      }
    });
    if (staged_) {
      staged_->bring_back();
    }
  }

 private:
  MpiWatch make_watch() const {
    return {communicator_.runtime_, communicator_.group_, call_, communicator_.options_.deadline};
  }
  void go_on(bool first) noexcept override {
    if (failure_) {
      return;
    }
    try {
      if (first) {
        send();
      }
      messages_->poll();
    } catch (...) {
      failure_ = std::current_exception();
    }
  }
  bool has_been_sent() const override { return sent_ && messages_->have_been_sent(); }

  void send() {
    if (!sent_) {
      messages_->send(tag_of(call_), communicator_.piece_bytes_);
      sent_ = true;
    }
  }
  template <typename Work>
  void checked(const Work& work) {
    try {
      work();
    } catch (const MpiPeerError& error) {
      make_watch().fail(c10::str("failed with ", communicator_.group_.describe({error.peer()}),
                                 ": ", error.what()),
                        {error.peer()});
    } catch (const MpiError& error) {
      make_watch().fail(error.what(), messages_->pending());
    }
  }

  MpiCommunicator& communicator_;
  MpiCallId call_;
  std::optional<StagedMessages> staged_;
  std::optional<MpiMessages> messages_;
  std::atomic<bool> sent_ = false;
  std::exception_ptr failure_;       ///< met in the background
  MpiProgress* progress_ = nullptr;  ///< that polls the messages until they are waited for
};

std::unique_ptr<Pending> MpiCommunicator::start(Collective call, Messages messages) {
  if (const auto failure = runtime_.failure()) {
    refuse_after(*failure, group_, runtime_.rank(), call);
  }
  return std::make_unique<UnderWay>(*this, call, std::move(messages));
}

/// No MPI communicator is made: a group is a list of ranks and a range of tags. Groups that share a rank
/// differ in their id, as each of its members has counted past it.
std::shared_ptr<Communicator> MpiCommunicator::regroup(const std::vector<int>& members, int rank) {
  const at::Tensor next = at::empty({size()}, at::kInt);
  gather(Collective::kSplit, at::scalar_tensor(runtime_.next_group, at::kInt), next);
  const int id = next.max().item<int>();
  runtime_.next_group = id + 1;
  if (id >= runtime_.tag_limit() / kTagsPerGroup) {
    throw std::runtime_error(c10::str("split: MPI's tags suffice for ",
                                      runtime_.tag_limit() / kTagsPerGroup - 1, " groups"));
  }
  std::vector<int> of_world;
  for (const int member : members) {
    of_world.push_back(group_.members[member]);
  }
  return std::make_shared<MpiCommunicator>(
      runtime_, MpiGroup(id, std::move(of_world), runtime_.size()), rank, options_, piece_bytes_);
}

/// What sets the ranks that the launcher started apart from those that MPI knows; empty: nothing.
std::string launch_error(const Communicator& world) {
  try {
    const RankInfo info = discover_rank();
    if (info.launcher.empty() || (info.rank == world.rank() && info.size == world.size())) {
      return {};
    }
    return c10::str("this process is rank ", info.rank, " of ", info.size, " to ", info.launcher,
                    ", but rank ", world.rank(), " of ", world.size(),
                    " to MPI: start it with the mpirun of the MPI it is linked with, or with srun "
                    "--mpi=TYPE, of a type that this MPI knows (srun --mpi=list)");
  } catch (const InputError& error) {
    return error.what();
  }
}

/// Refuses, on every rank together, a job that was not started as its ranks believe.
void check_launch(Communicator& world) {
  const auto errors = all_gather_strings(world, launch_error(world));
  check_input(errors[world.rank()].empty(), "make_mpi_communicator: ", errors[world.rank()]);
  for (int rank = 0; rank < world.size(); ++rank) {
    if (!errors[rank].empty()) {
      throw CommunicationError(
          c10::str("make_mpi_communicator: rank ", rank, " says: ", errors[rank]), {rank});
    }
  }
}

}  // namespace

std::shared_ptr<Communicator> make_mpi_communicator(const CommunicatorOptions& options,
                                                    int64_t piece_bytes) {
  check_options("make_mpi_communicator", options);
  MpiRuntime& runtime = MpiRuntime::get(options.deadline);
  std::vector<int> all(runtime.size());
  std::iota(all.begin(), all.end(), 0);
  MpiCommunicator world(runtime, MpiGroup(kWorldGroup, std::move(all), runtime.size()),
                        runtime.rank(), options, piece_bytes);
  check_launch(world);
  return world.split(/*color=*/0, /*key=*/0);
}

std::shared_ptr<Communicator> make_mpi_communicator(const CommunicatorOptions& options) {
  return make_mpi_communicator(options, kMpiPieceBytes);
}

}  // namespace anabranch
