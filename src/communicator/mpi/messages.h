#pragma once

#include <anabranch/communicator.h>

#include <atomic>
#include <vector>

#include "communicator/mpi/runtime.h"

namespace anabranch {

/// The messages of one exchange, in flight. If there still are some when this is destroyed, which only
/// happens after a failure, their tensors are kept for good: MPI may write into them at any time.
class MpiMessages {
 public:
  /// Peers are ranks of MPI_COMM_WORLD.
  MpiMessages(MpiRuntime& runtime, Messages messages);
  ~MpiMessages();
  MpiMessages(const MpiMessages&) = delete;
  MpiMessages& operator=(const MpiMessages&) = delete;

  // Start to receive, and to send. Throw MpiPeerError.
  void receive(int tag, int64_t piece_bytes);
  void send(int tag, int64_t piece_bytes);
  /// Whether all messages have come and gone. Throws MpiPeerError.
  bool poll();
  /// Whether what goes out has gone, as of the last poll; for any thread.
  bool have_been_sent() const { return sending_ == 0; }
  /// Ranks whose messages are outstanding.
  std::vector<int> pending() const;

 private:
  enum class Direction { kIncoming, kOutgoing };
  struct Piece {
    int peer;
    int bytes;
    Direction direction;
  };

  void post(const std::vector<Message>& messages, Direction direction, int tag,
            int64_t piece_bytes);
  void start(const Message& message, Direction direction, int tag, int64_t piece_bytes);
  void check_piece(const Piece& piece, int result, const MPI_Status& status) const;

  MpiRuntime& runtime_;
  Messages messages_;
  std::vector<Piece> pieces_;  ///< of the requests
  std::vector<MPI_Request> requests_;
  std::vector<int> indices_;
  std::vector<MPI_Status> statuses_;
  size_t outstanding_ = 0;
  std::atomic<size_t> sending_ = 0;  ///< of these
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
