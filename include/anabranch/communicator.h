#pragma once

#include <torch/types.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace anabranch {

/// One buffer's part of an all-to-all: rows are slices along dimension 0, grouped by peer.
///
/// `send` holds Σ send_rows rows, those for rank 0 first; `receive` is overwritten with
/// Σ receive_rows rows, those from rank 0 first. Both contiguous, one type, rows of one shape.
struct Transfer {
  torch::Tensor send;                 ///< [Σ send_rows, ..]
  std::vector<int64_t> send_rows;     ///< [size]
  torch::Tensor receive;              ///< [Σ receive_rows, ..]
  std::vector<int64_t> receive_rows;  ///< [size]
  /// [Σ send_rows], int64: the row of `send` for each row sent, of which `send` then has any number.
  /// On a GPU it is not read by the host, so not checked. Undefined: they are the rows of `send` in
  /// order.
  torch::Tensor send_index = {};
  /// [2, size] int64 beside the rows: how many go to each rank, and come from each, where `send_rows` and
  /// `receive_rows` are empty. The tensors then have room for them, or more. On a GPU the host does not read
  /// them, nor are they checked, or in `traffic`; where `reads_counts_on` says so alone.
  torch::Tensor counts = {};
};

/// What this rank has moved to and from *other* ranks since construction or `reset_traffic`; in a
/// collective of NCCL's own, which does not say how it goes, what goes straight from rank to rank.
struct Traffic {
  int64_t bytes_sent = 0;  ///< of tensors
  int64_t bytes_received = 0;
  int64_t collectives = 0;  ///< calls, whatever they moved
};

/// Of communicators between processes.
struct CommunicatorOptions {
  /// How long one collective may wait for a peer before it ends in a CommunicationError.
  std::chrono::milliseconds deadline = std::chrono::minutes(5);
  /// NCCL's communicator: whether rows go between GPUs through memory that they map from each other,
  /// by a kernel of this library's, where all ranks are on one host and at most 8. All ranks alike.
  /// Where the memory cannot be mapped, a warning says why, and they go by NCCL; as they do where
  /// NCCL_P2P_DISABLE is set.
  bool peer_memory = true;
};

/// What a rank is in, as errors name it.
enum class Collective : int32_t {
  kAllToAllV,
  kAllReduce,
  kAllGather,
  kBroadcast,
  kBarrier,
  kSplit,
};

/// Some bytes of a tensor, at least one, for or from another rank.
struct Message {
  int peer;
  torch::Tensor tensor;  ///< contiguous
  int64_t begin;         ///< bytes from the tensor's first
  int64_t bytes;

  const std::byte* source() const {
    return static_cast<const std::byte*>(tensor.const_data_ptr()) + begin;
  }
  std::byte* target() const { return static_cast<std::byte*>(tensor.mutable_data_ptr()) + begin; }
};

/// What a rank exchanges with others at once. Those between two ranks are matched in order, on both
/// sides alike.
struct Messages {
  torch::Device device;  ///< of all tensors; the same on every rank, also where it has none
  std::vector<Message> outgoing = {};
  std::vector<Message> incoming = {};
};

/// What a communicator has under way. It may neither outlive the communicator nor be dropped before it is
/// finished, but after a failure.
class Pending {
 public:
  Pending() = default;
  virtual ~Pending() = default;
  Pending(const Pending&) = delete;
  Pending& operator=(const Pending&) = delete;

  /// Completes, or orders on the current stream, which is the one it was started on. Once. Ends as the
  /// call would that does not come back before.
  virtual void finish() = 0;
  /// The caller turns to other work: what would only go on while somebody waits does so from now on by
  /// itself.
  virtual void run_in_background() {}
};

/// In which order ranks may call a group and others that were split from it, each group's own calls being in one.
enum class SplitOrder {
  kAny,  ///< by several threads, in another order on each rank
  /// Best in the same: calls launch kernels, and of two that wait for other ranks' in two orders CUDA promises no
  /// progress. Streams may share a queue, and loading a kernel or allocating memory may wait for those that run.
  kBestOne,
  kOne,  ///< in the same: they are calls of one group underneath
};

/// A group of ranks that can exchange tensors.
///
/// Every rank of the group calls every collective, in the same order, whatever it holds. The public
/// calls check their arguments and throw InputError before anything is sent; a peer that dies or
/// stalls ends the call in a CommunicationError that names it, within the deadline.
/// Results are deterministic: sums are taken in rank order; where rows or NCCL go over several nodes,
/// large ones within each node first.
class Communicator {
 public:
  Communicator(int rank, int size) : rank_(rank), size_(size) {}
  virtual ~Communicator() = default;
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  int rank() const noexcept { return rank_; }
  int size() const noexcept { return size_; }
  /// "self", "mpi", "store", "nccl"
  virtual std::string name() const = 0;

  /// Exchanges the rows of all transfers at once. Zero rows to or from any peer are fine.
  void all_to_all_v(const std::vector<Transfer>& transfers);
  /// The same beside what the caller does until it calls `finish`: on a GPU on a stream of its own, behind
  /// all that the current stream has been given. Until then the rows that are sent stay as they are, and
  /// those that come are left alone. The deadline is that of `finish`. Several may be under way, and other
  /// collectives be called in between, by all ranks in the same order.
  std::unique_ptr<Pending> start_all_to_all_v(std::vector<Transfer> transfers);
  /// Whether counts of transfers may be known to `device` alone.
  virtual bool reads_counts_on(torch::Device device) const { return device.is_cpu(); }
  /// Replaces `tensor` with the sum over ranks; 16-bit types are summed in fp32 and rounded once.
  void all_reduce(torch::Tensor& tensor);
  /// `[size, *tensor.sizes()]`, the same shape on every rank.
  torch::Tensor all_gather(const torch::Tensor& tensor);
  /// Overwrites `tensor` with `root`'s.
  void broadcast(torch::Tensor& tensor, int root);
  void barrier();
  /// Ranks with the same `color` form a new group, ordered by (`key`, rank). Collective.
  std::shared_ptr<Communicator> split(int color, int key);

  /// Throws the CommunicationError of a collective that failed after its call had returned, on a
  /// stream. To be called when the host has waited for that stream, before it uses what came.
  virtual void check() {}

  /// In which order the ranks call this group and those split from it, with tensors on `device`.
  virtual SplitOrder split_order(torch::Device /*device*/) const { return SplitOrder::kAny; }

  const Traffic& traffic() const noexcept { return traffic_; }
  void reset_traffic() noexcept { traffic_ = {}; }

 protected:
  /// The one thing that a transport does: sends and receives all messages at once, which have been posted,
  /// or launched on the current stream, when this returns.
  virtual std::unique_ptr<Pending> start(Collective call, Messages messages) = 0;
  /// A group of `members`, of which this rank is number `rank`. Collective: every rank gives the
  /// members of its own new group.
  virtual std::shared_ptr<Communicator> regroup(const std::vector<int>& members, int rank) = 0;
  /// Throws InputError if this communicator cannot move tensors of `device`.
  virtual void check_device(torch::Device device) const = 0;

  // The collectives, their arguments checked, made of exchanges. A transport that has something faster
  // overrides them, and counts what it moves.
  virtual std::unique_ptr<Pending> do_all_to_all_v(std::vector<Transfer> transfers);
  virtual void do_all_reduce(torch::Tensor& tensor);
  virtual void do_all_gather(const torch::Tensor& tensor, torch::Tensor& gathered);
  virtual void do_broadcast(torch::Tensor& tensor, int root);
  virtual void do_barrier();

  /// `gathered[r]` becomes rank r's `tensor`.
  void gather(Collective call, const torch::Tensor& tensor, const torch::Tensor& gathered);
  void count(int64_t bytes_sent, int64_t bytes_received);
  // What another communicator, which this one is over, does in its place.
  static std::unique_ptr<Pending> start_by(Communicator& other, Collective call,
                                           Messages messages) {
    return other.start_counted(call, std::move(messages));
  }
  static std::unique_ptr<Pending> start_rows_by(Communicator& other,
                                                std::vector<Transfer> transfers) {
    return other.start_rows(std::move(transfers));
  }
  static std::shared_ptr<Communicator> regroup_by(Communicator& other,
                                                  const std::vector<int>& members, int rank) {
    return other.regroup(members, rank);
  }

 private:
  std::unique_ptr<Pending> start_counted(Collective call, Messages messages);
  /// On the current stream.
  std::unique_ptr<Pending> start_rows(std::vector<Transfer> transfers);

  int rank_;
  int size_;
  Traffic traffic_;
};

/// One process on its own; any device.
std::shared_ptr<Communicator> make_self_communicator();

/// MPI_COMM_WORLD's ranks. Initialises MPI if nobody has, and then finalises it at exit. Tensors in
/// GPU memory are handed to an MPI that says it is CUDA-aware, and staged through pinned host memory
/// otherwise; either way a call waits for the current stream. Throws NotBuiltError in a build
/// without MPI.
std::shared_ptr<Communicator> make_mpi_communicator(const CommunicatorOptions& options = {});

/// Ranks that meet at a store on `host`:`port`, kept by rank 0 (c10d's TCPStore; port 0 takes a free
/// one where there is one rank only). For tensors in host memory, and for few bytes: what NCCL needs
/// to start where there is no MPI. Used by one thread at a time, with all groups split from it.
/// torchrun's MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE fit.
/// Throws CommunicationError if the store cannot be reached within the deadline.
std::shared_ptr<Communicator> make_store_communicator(const std::string& host, int port, int rank,
                                                      int size,
                                                      const CommunicatorOptions& options = {});

/// The ranks of `bootstrap`, for tensors on `device`, this rank's GPU, by NCCL on the caller's
/// current stream. Tensors in host memory take the way of `bootstrap`, which NCCL's id travels
/// through as well. A failure on the stream ends in a CommunicationError from the next call, `check`
/// or `barrier`, which waits. Collective. A rank that fails here is named on all. Throws
/// NotBuiltError in a build without NCCL.
std::shared_ptr<Communicator> make_nccl_communicator(std::shared_ptr<Communicator> bootstrap,
                                                     torch::Device device,
                                                     const CommunicatorOptions& options = {});

/// The same for ranks that have no other way to each other than an id, which one of them made by
/// `make_nccl_unique_id` and the caller has brought to all. Tensors in host memory go through a store.
std::shared_ptr<Communicator> make_nccl_communicator(const std::string& unique_id, int rank,
                                                     int size, torch::Device device,
                                                     const CommunicatorOptions& options = {});
/// An id of NCCL's for one group of ranks: bytes, not text.
std::string make_nccl_unique_id();

}  // namespace anabranch
