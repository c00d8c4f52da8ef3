#pragma once

#include <anabranch/communicator.h>
#include <c10/util/intrusive_ptr.h>

#include <optional>
#include <string>
#include <vector>

namespace c10d {
class Store;
}

namespace anabranch {

/// How far every rank of a group is, on a small server beside the data (rank 0's, reached by TCP),
/// so that a rank that waits in vain can say for whom: NCCL itself does not know.
class NcclProgress {
 public:
  /// Collective over `bootstrap`, whose ranks are the group's. `deadline` bounds every request.
  NcclProgress(Communicator& bootstrap, std::chrono::milliseconds deadline);
  ~NcclProgress();
  NcclProgress(const NcclProgress&) = delete;
  NcclProgress& operator=(const NcclProgress&) = delete;

  /// Tells the others that this rank is alive and has begun its `started`th collective.
  void publish(int64_t started);
  /// Ranks that do not live any more, or have not come to the `sequence`th collective. Takes some
  /// `heartbeat`s: who has not published for so long is dead.
  std::vector<int> missing(int64_t sequence, std::chrono::milliseconds heartbeat);

  struct Failure {
    std::string text;
    std::vector<int> culprits;
  };
  /// Tells all ranks why this one has given up; the first to fail counts.
  void announce(const Failure& failure);
  /// What another rank has announced.
  std::optional<Failure> announced();

 private:
  struct State {
    int64_t beats = 0;
    int64_t started = 0;
  };
  std::vector<State> read();

  int rank_;
  int size_;
  int64_t beats_ = 0;
  c10::intrusive_ptr<c10d::Store> store_;
};

}  // namespace anabranch
