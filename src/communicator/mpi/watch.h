#pragma once

#include <anabranch/communicator.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "communicator/mpi/group.h"
#include "communicator/mpi/runtime.h"
#include "communicator/waiting_time.h"

namespace anabranch {

/// One exchange of messages: the `sequence`th of a group.
struct MpiCallId {
  int32_t group = 0;
  Collective collective = Collective::kBarrier;
  int64_t sequence = 0;
  bool operator==(const MpiCallId&) const = default;
};

/// Throws what a call of `group` on `rank` (of MPI_COMM_WORLD) ends in after a failure elsewhere.
[[noreturn]] void refuse_after(const MpiFailure& failure, const MpiGroup& group, int rank,
                               Collective call);

/// A call that a thread of a rank waits in, and for whom (ranks of MPI_COMM_WORLD).
struct MpiWait {
  MpiCallId call;
  std::vector<int> waits_for;
};

/// Finds out whom a waiting rank waits for in the end.
///
/// A rank may wait for a live one that itself waits for a dead one. So, shortly before its
/// deadline, a rank asks those it waits for, and those they wait for. Whoever waits answers;
/// whoever does not answer is to blame. A rank that gives up tells all others, which end at once
/// and blame the same. Several threads of a rank may wait: each answers for all of them, and
/// receives what is meant for another.
class MpiWatch {
 public:
  MpiWatch(MpiRuntime& runtime, const MpiGroup& group, MpiCallId call,
           std::chrono::milliseconds deadline);
  ~MpiWatch();
  MpiWatch(const MpiWatch&) = delete;
  MpiWatch& operator=(const MpiWatch&) = delete;

  const MpiCallId& call() const noexcept { return call_; }

  /// Called again and again while messages from or to the `pending` ranks are outstanding; throws
  /// CommunicationError when waiting for them has become vain.
  void keep_waiting(const std::function<std::vector<int>()>& pending);

  /// Ends this and every later call, here and on the other ranks. `culprits`: of MPI_COMM_WORLD.
  [[noreturn]] void fail(const std::string& reason, const std::vector<int>& culprits);

 private:
  void listen(const std::vector<int>& pending);
  void answer(int rank, int32_t question);
  void ask(const std::vector<int>& ranks);
  std::vector<int> reached_from(const std::vector<int>& pending) const;
  [[noreturn]] void give_up(const std::vector<int>& pending);

  MpiRuntime& runtime_;
  const MpiGroup& group_;
  MpiCallId call_;
  std::chrono::milliseconds deadline_;
  WaitingTime waiting_;
  int32_t question_;
  std::set<int> asked_;
  std::map<int, std::vector<MpiWait>> answers_;  ///< by rank, for each of its threads
};

}  // namespace anabranch
