#pragma once

#include <torch/types.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace anabranch {

/// One buffer's part of an all-to-all: rows are slices along dimension 0, grouped by peer.
///
/// `send` holds Σ send_rows rows, those for rank 0 first; `receive` is overwritten with
/// Σ receive_rows rows, those from rank 0 first. Both contiguous, one type, rows of one shape.
struct Transfer {
  torch::Tensor send;
  std::vector<int64_t> send_rows;  ///< [size]
  torch::Tensor receive;
  std::vector<int64_t> receive_rows;  ///< [size]
};

/// What this rank has moved to and from *other* ranks since construction or `reset_traffic`.
struct Traffic {
  int64_t bytes_sent = 0;
  int64_t bytes_received = 0;
  int64_t collectives = 0;
};

struct CommunicatorOptions {
  /// How long one collective may wait for a peer before it ends in a CommunicationError.
  std::chrono::milliseconds deadline = std::chrono::minutes(5);
};

/// A group of ranks that can exchange tensors.
///
/// Every rank of the group calls every collective, in the same order, whatever it holds. The public
/// calls check their arguments and throw InputError before anything is sent; a peer that dies or
/// stalls ends the call in a CommunicationError that names it, within the deadline.
/// Results are deterministic: sums are taken in rank order.
class Communicator {
 public:
  Communicator(int rank, int size) : rank_(rank), size_(size) {}
  virtual ~Communicator() = default;
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  int rank() const noexcept { return rank_; }
  int size() const noexcept { return size_; }
  /// "self", "mpi", ...
  virtual std::string name() const = 0;

  /// Exchanges the rows of all transfers at once. Zero rows to or from any peer are fine.
  void all_to_all_v(const std::vector<Transfer>& transfers);
  /// Replaces `tensor` with the sum over ranks; 16-bit types are summed in fp32 and rounded once.
  void all_reduce(torch::Tensor& tensor);
  /// `[size, *tensor.sizes()]`, the same shape on every rank.
  torch::Tensor all_gather(const torch::Tensor& tensor);
  /// Overwrites `tensor` with `root`'s.
  void broadcast(torch::Tensor& tensor, int root);
  void barrier();
  /// Ranks with the same `color` form a new group, ordered by (`key`, rank). Collective.
  virtual std::shared_ptr<Communicator> split(int color, int key) = 0;

  const Traffic& traffic() const noexcept { return traffic_; }
  void reset_traffic() noexcept { traffic_ = {}; }

 protected:
  /// Arguments are already checked. Implementations complete, or order on the current stream.
  virtual void do_all_to_all_v(const std::vector<Transfer>& transfers) = 0;
  virtual void do_all_reduce(torch::Tensor& tensor) = 0;
  virtual void do_all_gather(const torch::Tensor& tensor, torch::Tensor& gathered) = 0;
  virtual void do_broadcast(torch::Tensor& tensor, int root) = 0;
  virtual void do_barrier() = 0;
  /// Throws InputError if this communicator cannot move tensors of `device`.
  virtual void check_device(torch::Device device) const = 0;

 private:
  int rank_;
  int size_;
  Traffic traffic_;
};

/// One process on its own; any device.
std::shared_ptr<Communicator> make_self_communicator();

/// MPI_COMM_WORLD's ranks, for tensors in host memory. Initialises MPI if nobody has, and then
/// finalises it at exit. Throws std::runtime_error in a build without MPI.
std::shared_ptr<Communicator> make_mpi_communicator(const CommunicatorOptions& options = {});

/// The ranks of `bootstrap`, which NCCL's id travels through, for tensors on `device`, this rank's
/// GPU. Collectives run on the caller's current stream; a failure is thrown by the next call, and by
/// `barrier`, which waits. Collective. Throws std::runtime_error in a build without NCCL.
std::shared_ptr<Communicator> make_nccl_communicator(std::shared_ptr<Communicator> bootstrap,
                                                     torch::Device device,
                                                     const CommunicatorOptions& options = {});

}  // namespace anabranch
