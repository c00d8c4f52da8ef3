#pragma once

#include <anabranch/communicator.h>
#include <netinet/in.h>

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace anabranch {

/// How far every rank of a group is, so that a rank that waits in vain can say for whom: NCCL itself
/// does not know. The ranks tell each other by datagrams beside the data, which nobody waits for; a
/// lost one is followed by the next. Used by one thread at a time.
class NcclHeartbeats {
 public:
  /// Collective over `bootstrap`, whose ranks are the group's.
  explicit NcclHeartbeats(Communicator& bootstrap);
  ~NcclHeartbeats();
  NcclHeartbeats(const NcclHeartbeats&) = delete;
  NcclHeartbeats& operator=(const NcclHeartbeats&) = delete;

  int rank() const noexcept { return rank_; }
  /// Tells the others that this rank is alive and has begun its `started`th collective.
  void publish(int64_t started);
  /// Takes in what the others have told.
  void listen();
  /// Ranks that are dead or stalled, or else, where all live, those that have not come to the
  /// `sequence`th collective: beside a dead rank these may be waiting for it, too. Takes three
  /// `heartbeat`s: who does not publish in that time is dead or stalled.
  std::vector<int> missing(int64_t sequence, std::chrono::milliseconds heartbeat);

  struct Failure {
    std::string text;
    std::vector<int> culprits;
  };
  /// Tells all ranks why this one has given up.
  void announce(const Failure& failure);
  /// What another rank has announced, the first of them.
  const std::optional<Failure>& announced() const { return announced_; }

 private:
  struct Datagram;
  struct State {
    int64_t beats = 0;  ///< datagrams that have come
    int64_t started = 0;
  };
  void send_to_all(const Datagram& datagram) const;

  int rank_;
  int socket_;
  uint64_t group_ = 0;  ///< tells this group's datagrams from all others
  std::vector<sockaddr_in> addresses_;
  std::vector<State> states_;
  std::optional<Failure> announced_;
};

}  // namespace anabranch
