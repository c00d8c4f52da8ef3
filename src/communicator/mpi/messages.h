#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <vector>

#include "communicator/mpi/runtime.h"

namespace anabranch {

/// What goes to and comes from one rank of MPI_COMM_WORLD, which may be this one; 0 bytes: nothing.
struct MpiParcel {
  int peer = 0;
  const std::byte* send = nullptr;
  int64_t send_bytes = 0;
  std::byte* receive = nullptr;
  int64_t receive_bytes = 0;
};

/// The messages of one exchange, in flight. Parcels for the same peer are matched in order.
///
/// The memory that parcels point into belongs to `buffers`. If messages are still in flight when
/// this is destroyed, which only happens after a failure, both are kept for good: MPI may write
/// into them at any time.
class MpiMessages {
 public:
  /// `by_host`: the memory is the host's, and what is for this rank itself is copied without MPI.
  MpiMessages(MpiRuntime& runtime, std::vector<at::Tensor> buffers, bool by_host);
  ~MpiMessages();
  MpiMessages(const MpiMessages&) = delete;
  MpiMessages& operator=(const MpiMessages&) = delete;

  /// Starts to receive and send. Throws MpiPeerError.
  void post(const std::vector<MpiParcel>& parcels, int tag, int64_t piece_bytes);
  /// Whether all messages have come and gone. Throws MpiPeerError.
  bool poll();
  /// Ranks whose messages are outstanding.
  std::vector<int> pending() const;

 private:
  enum class Direction { kIncoming, kOutgoing };
  struct Piece {
    int peer;
    int bytes;
    Direction direction;
  };

  void start(const MpiParcel& parcel, Direction direction, int tag, int64_t piece_bytes);
  void check_piece(const Piece& piece, int result, const MPI_Status& status) const;

  MpiRuntime& runtime_;
  std::vector<at::Tensor> buffers_;
  bool by_host_;
  std::vector<Piece> pieces_;  ///< of the requests
  std::vector<MPI_Request> requests_;
  std::vector<int> indices_;
  std::vector<MPI_Status> statuses_;
  size_t outstanding_ = 0;
};

/// A message to or from `peer` went wrong.
class MpiPeerError : public MpiError {
 public:
  MpiPeerError(int peer, const std::string& message) : MpiError(message), peer_(peer) {}
  int peer() const noexcept { return peer_; }

 private:
  int peer_;
};

}  // namespace anabranch
