#include "communicator/mpi/mpi.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <anabranch/error.h>
#include <anabranch/rank_discovery.h>

#include <algorithm>
#include <numeric>
#include <tuple>
#include <utility>

#include "communicator/agreement.h"
#include "communicator/chunks.h"
#include "communicator/mpi/messages.h"
#include "communicator/mpi/watch.h"
#include "support/check.h"
#include "support/stream.h"

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
         static_cast<int>(call.call);
}

const std::byte* bytes_of(const at::Tensor& tensor) {
  return static_cast<const std::byte*>(tensor.const_data_ptr());
}
std::byte* mutable_bytes_of(const at::Tensor& tensor) {
  return static_cast<std::byte*>(tensor.mutable_data_ptr());
}

/// Bytes from the start of a buffer to the rows of each peer, and to the end.
std::vector<int64_t> byte_offsets(const at::Tensor& tensor, const std::vector<int64_t>& rows) {
  const int64_t total = std::accumulate(rows.begin(), rows.end(), int64_t{0});
  const int64_t row_bytes = total == 0 ? 0 : static_cast<int64_t>(tensor.nbytes()) / total;
  std::vector<int64_t> offsets = {0};
  for (const int64_t count : rows) {
    offsets.push_back(offsets.back() + count * row_bytes);
  }
  return offsets;
}

/// A tensor that MPI can read and write in the place of another: itself, or a copy in pinned memory.
at::Tensor reachable(const at::Tensor& tensor) {
  if (tensor.is_cpu() || mpi_is_cuda_aware()) {
    return tensor;
  }
  return at::empty(tensor.sizes(), tensor.options().device(at::kCPU).pinned_memory(true));
}

at::Tensor reachable_copy(const at::Tensor& tensor) {
  at::Tensor reached = reachable(tensor);
  return reached.is_same(tensor) ? reached : reached.copy_(tensor);
}

/// Nothing is to be done where the tensor itself was reached. Ordered on the current stream; pinned
/// memory is not used again before that.
void bring_back(const at::Tensor& reached, const at::Tensor& tensor) {
  if (!reached.is_same(tensor)) {
    tensor.copy_(reached, /*non_blocking=*/true);
  }
}

/// Messages over MPI. Every collective is made of exchanges of messages between pairs of ranks, so
/// every wait is for ranks that can be named.
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

  std::shared_ptr<Communicator> split(int color, int key) override;

 protected:
  void do_all_to_all_v(const std::vector<Transfer>& transfers) override;
  void do_all_reduce(torch::Tensor& tensor) override;
  void do_all_gather(const torch::Tensor& tensor, torch::Tensor& gathered) override;
  void do_broadcast(torch::Tensor& tensor, int root) override;
  void do_barrier() override;
  void check_device(torch::Device device) const override {
    check_input(device.is_cpu() || device.is_cuda(),
                "the mpi communicator moves tensors in host or GPU memory, not on ", device);
  }

 private:
  MpiWatch begin(MpiCall call);
  void exchange_rows(const std::vector<Transfer>& transfers);
  void sum(torch::Tensor& tensor);
  void exchange(MpiWatch& watch, std::vector<MpiParcel> parcels, std::vector<at::Tensor> buffers);
  void gather(MpiWatch& watch, const at::Tensor& tensor, const at::Tensor& gathered);
  /// The `i`th rank to send to, this one first: each rank sends to another at a time.
  int peer(int i) const { return (rank() + i) % size(); }

  MpiRuntime& runtime_;
  MpiGroup group_;
  CommunicatorOptions options_;
  int64_t piece_bytes_;
  int64_t calls_ = 0;
};

MpiWatch MpiCommunicator::begin(MpiCall call) {
  if (const auto failure = runtime_.failure()) {
    refuse_after(*failure, group_, runtime_.rank(), call);
  }
  return MpiWatch(runtime_, group_, {group_.id, call, ++calls_}, options_.deadline);
}

/// `parcels` name peers by their ranks here.
void MpiCommunicator::exchange(MpiWatch& watch, std::vector<MpiParcel> parcels,
                               std::vector<at::Tensor> buffers) {
  for (MpiParcel& parcel : parcels) {
    parcel.peer = group_.members[parcel.peer];
  }
  // MPI does not know streams.
  std::for_each(buffers.begin(), buffers.end(), wait_for_stream);
  const bool by_host = buffers.empty() || buffers.front().is_cpu();
  MpiMessages messages(runtime_, std::move(buffers), by_host);
  try {
    messages.post(parcels, tag_of(watch.call()), piece_bytes_);
    while (!messages.poll()) {
      watch.keep_waiting([&] { return messages.pending(); });
    }
  } catch (const MpiPeerError& error) {
    watch.fail(c10::str("failed with ", group_.describe({error.peer()}), ": ", error.what()),
               {error.peer()});
  } catch (const MpiError& error) {
    watch.fail(error.what(), messages.pending());
  }
}

void MpiCommunicator::do_all_to_all_v(const std::vector<Transfer>& transfers) {
  std::vector<Transfer> reached = transfers;
  for (Transfer& transfer : reached) {
    transfer.send = reachable_copy(transfer.send);
    transfer.receive = reachable(transfer.receive);
  }
  exchange_rows(reached);
  for (size_t i = 0; i < transfers.size(); ++i) {
    bring_back(reached[i].receive, transfers[i].receive);
  }
}

void MpiCommunicator::exchange_rows(const std::vector<Transfer>& transfers) {
  MpiWatch watch = begin(MpiCall::kAllToAllV);
  std::vector<MpiParcel> parcels;
  std::vector<at::Tensor> buffers;
  for (const Transfer& transfer : transfers) {
    const std::vector<int64_t> from = byte_offsets(transfer.send, transfer.send_rows);
    const std::vector<int64_t> to = byte_offsets(transfer.receive, transfer.receive_rows);
    const std::byte* send = bytes_of(transfer.send);
    std::byte* receive = mutable_bytes_of(transfer.receive);
    for (int i = 0; i < size(); ++i) {
      const int p = peer(i);
      parcels.push_back(
          {p, send + from[p], from[p + 1] - from[p], receive + to[p], to[p + 1] - to[p]});
    }
    buffers.insert(buffers.end(), {transfer.send, transfer.receive});
  }
  exchange(watch, std::move(parcels), std::move(buffers));
}

void MpiCommunicator::do_all_reduce(torch::Tensor& tensor) {
  if (size() == 1) {
    return;
  }
  at::Tensor reached = reachable_copy(tensor);
  sum(reached);
  bring_back(reached, tensor);
}

/// Every rank sums one chunk of the tensor, in rank order, and sends the sum to all: each element
/// crosses the wire twice, and is the same on every rank and in every run.
void MpiCommunicator::sum(torch::Tensor& tensor) {
  MpiWatch watch = begin(MpiCall::kAllReduce);
  const at::Tensor flat = tensor.view({-1});
  const auto item = static_cast<int64_t>(tensor.element_size());
  const int64_t own = chunk_length(flat.numel(), rank(), size());
  const at::Tensor terms = at::empty({size(), own}, tensor.options());
  const at::Tensor sum = flat.narrow(0, chunk_begin(flat.numel(), rank(), size()), own);

  std::vector<MpiParcel> scatter;
  std::vector<MpiParcel> gather;
  for (int i = 1; i < size(); ++i) {
    const int p = peer(i);
    std::byte* chunk = mutable_bytes_of(flat) + chunk_begin(flat.numel(), p, size()) * item;
    const int64_t chunk_bytes = chunk_length(flat.numel(), p, size()) * item;
    std::byte* term = mutable_bytes_of(terms) + p * own * item;
    scatter.push_back({p, chunk, chunk_bytes, term, own * item});
    gather.push_back({p, bytes_of(sum), own * item, chunk, chunk_bytes});
  }
  exchange(watch, std::move(scatter), {flat, terms});

  const auto term = [&](int r) { return r == rank() ? sum : terms[r]; };
  at::Tensor total = term(0).to(at::toOpMathType(tensor.scalar_type())) + term(1);
  for (int r = 2; r < size(); ++r) {
    total.add_(term(r));
  }
  sum.copy_(total);
  exchange(watch, std::move(gather), {flat});
}

void MpiCommunicator::gather(MpiWatch& watch, const at::Tensor& tensor,
                             const at::Tensor& gathered) {
  const auto bytes = static_cast<int64_t>(tensor.nbytes());
  std::vector<MpiParcel> parcels;
  for (int i = 0; i < size(); ++i) {
    const int p = peer(i);
    parcels.push_back({p, bytes_of(tensor), bytes, mutable_bytes_of(gathered) + p * bytes, bytes});
  }
  exchange(watch, std::move(parcels), {tensor, gathered});
}

void MpiCommunicator::do_all_gather(const torch::Tensor& tensor, torch::Tensor& gathered) {
  MpiWatch watch = begin(MpiCall::kAllGather);
  const at::Tensor reached = reachable(gathered);
  gather(watch, reachable_copy(tensor), reached);
  bring_back(reached, gathered);
}

void MpiCommunicator::do_broadcast(torch::Tensor& tensor, int root) {
  MpiWatch watch = begin(MpiCall::kBroadcast);
  const at::Tensor reached = rank() == root ? reachable_copy(tensor) : reachable(tensor);
  const auto bytes = static_cast<int64_t>(tensor.nbytes());
  std::vector<MpiParcel> parcels;
  if (rank() == root) {
    for (int i = 1; i < size(); ++i) {
      parcels.push_back({peer(i), bytes_of(reached), bytes, nullptr, 0});
    }
  } else {
    parcels.push_back({root, nullptr, 0, mutable_bytes_of(reached), bytes});
  }
  exchange(watch, std::move(parcels), {reached});
  if (rank() != root) {
    bring_back(reached, tensor);
  }
}

void MpiCommunicator::do_barrier() {
  MpiWatch watch = begin(MpiCall::kBarrier);
  const at::Tensor token = at::zeros({1}, at::kByte);
  gather(watch, token, at::empty({size(), 1}, at::kByte));
}

/// No MPI communicator is made: a group is a list of ranks and a range of tags.
std::shared_ptr<Communicator> MpiCommunicator::split(int color, int key) {
  MpiWatch watch = begin(MpiCall::kSplit);
  const at::Tensor mine = at::tensor({color, key, runtime_.next_group}, at::kInt);
  const at::Tensor all = at::empty({size(), 3}, at::kInt);
  gather(watch, mine, all);

  // Groups that share a rank differ in their id, as each of its members has counted past it.
  const auto ranks = all.accessor<int, 2>();
  std::vector<std::tuple<int, int>> ordered;  // key, rank
  int id = 0;
  for (int r = 0; r < size(); ++r) {
    id = std::max(id, ranks[r][2]);
    if (ranks[r][0] == color) {
      ordered.emplace_back(ranks[r][1], r);
    }
  }
  runtime_.next_group = id + 1;
  if (id >= runtime_.tag_limit() / kTagsPerGroup) {
    throw std::runtime_error(c10::str("split: MPI's tags suffice for ",
                                      runtime_.tag_limit() / kTagsPerGroup - 1, " groups"));
  }
  std::sort(ordered.begin(), ordered.end());
  const auto self = std::find(ordered.begin(), ordered.end(), std::tuple(key, rank()));
  const auto rank_in_group = static_cast<int>(self - ordered.begin());
  std::vector<int> members;
  for (const auto& [unused_key, r] : ordered) {
    members.push_back(group_.members[r]);
  }
  return std::make_shared<MpiCommunicator>(runtime_,
                                           MpiGroup(id, std::move(members), runtime_.size()),
                                           rank_in_group, options_, piece_bytes_);
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
  check_input(options.deadline.count() > 0, "make_mpi_communicator: the deadline is ",
              options.deadline.count(), " ms, expected more than 0");
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
