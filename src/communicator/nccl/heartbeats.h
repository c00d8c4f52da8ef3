#pragma once

#include <anabranch/communicator.h>

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "communicator/nccl/address.h"
#include "communicator/nccl/datagram.h"

namespace anabranch {

/// How far every rank of a group is, so that a rank that waits in vain can say for whom: NCCL itself
/// does not know. The ranks tell each other by datagrams beside the data, which nobody waits for; a
/// lost one is followed by the next. They are signed with a key that the ranks get through their
/// bootstrap, and count only from the address that their sender has named. Used by one thread at a time.
class NcclHeartbeats {
 public:
  static constexpr int kRepeats = 3;  ///< of what nothing follows, as a datagram may be lost

  /// Collective over `bootstrap`, whose ranks are the group's. Where datagrams do not come through,
  /// rank 0 warns, once in a process, that nobody can be named.
  explicit NcclHeartbeats(Communicator& bootstrap);

  int rank() const noexcept { return rank_; }
  /// Why nobody can be named, the same on every rank; empty where they can.
  const std::string& obstacle() const noexcept { return obstacle_; }
  /// Where this rank's come from, and the others' go to.
  const SocketAddress& address() const { return addresses_.at(rank_); }

  /// Tells the others that this rank is alive, has begun its `started`th collective and seen the end of the
  /// `ended`th. To be called once a heartbeat.
  void publish(int64_t started, int64_t ended);
  /// Takes in what the others have told, at most so much as leaves the thread free.
  void listen();
  /// Whom a rank waits for that is in the `first`th collective, or in one behind it up to the `last`th, where it
  /// cannot tell which. Ranks that are dead or stalled, or else, where all live, those that have not come to the
  /// first of these to which not all have: beside a dead rank these may be waiting for it, too. Takes three
  /// `heartbeat`s: who does not publish in that time is dead or stalled.
  std::vector<int> missing(int64_t first, int64_t last, std::chrono::milliseconds heartbeat);
  /// Whether every other rank has seen the end of the `sequence`th collective, or has been silent while this one
  /// has published `silence` times: it is dead, or has left.
  bool all_have_ended(int64_t sequence, int64_t silence) const;
  /// Tells all ranks why this one has given up.
  void announce(const NcclFailure& failure);
  /// What another rank has announced, the first of them.
  const std::optional<NcclFailure>& announced() const { return announced_; }

 private:
  struct Socket {
    Socket() = default;
    ~Socket();
    Socket(const Socket&) = delete;
    Socket& operator=(const Socket&) = delete;
    int descriptor = -1;
  };
  struct State {
    uint64_t number = 0;  ///< of the last datagram that has come
    int64_t started = 0;
    int64_t ended = 0;
    int64_t heard = 0;  ///< when it came, in own signs
  };
  std::string meet(Communicator& bootstrap);
  std::string greet(Communicator& bootstrap);
  void open_socket(const std::string& host);
  void send_to_all(HeartbeatDatagram datagram);

  int rank_;
  Socket socket_;  ///< none: nothing is told
  SipHashKey key_ = {};
  uint64_t sent_ = 0;
  int64_t signs_ = 0;  ///< published
  std::vector<SocketAddress> addresses_;
  std::vector<State> states_;
  std::optional<NcclFailure> announced_;
  std::string obstacle_;
};

/// How a failure names those whom it is laid to, behind what has failed.
std::string blame(const std::vector<int>& culprits, const NcclHeartbeats& heartbeats);

}  // namespace anabranch
