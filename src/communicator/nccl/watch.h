#pragma once

#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>

#include "communicator/nccl/family.h"
#include "communicator/nccl/group.h"
#include "communicator/nccl/heartbeats.h"
#include "communicator/waiting_time.h"
#include "support/cuda/handle.h"

namespace anabranch {

/// Watches a group's collectives: one that does not end within its deadline, or that NCCL reports as
/// failed, ends all of them and those of the groups of its family, here and on the other ranks, and is told
/// by `check`: before streams go on, so that who has waited for a stream learns it there. The time of a
/// collective begins when the stream has come to it, and is that which this process lives: ranks that were
/// all stopped go on.
///
/// One thread asks CUDA how far the streams are. Its calls may have to wait for another thread's, which
/// may wait for a collective that never ends: so it is another thread, calling nothing of CUDA's, that
/// tells the other ranks that this one lives, and gives up.
class NcclWatch {
 public:
  /// How often a rank tells the others that it lives.
  static std::chrono::milliseconds heartbeat_for(std::chrono::milliseconds deadline);

  /// `on_failure` ends what the group does not know of. It is called by a thread of the watch's.
  NcclWatch(NcclGroup& group, NcclHeartbeats& heartbeats, const NcclFamily& family, int device,
            std::chrono::milliseconds deadline, std::function<void()> on_failure);
  ~NcclWatch();
  NcclWatch(const NcclWatch&) = delete;
  NcclWatch& operator=(const NcclWatch&) = delete;

  /// Throws CommunicationError if the group has failed.
  void check();
  /// Launches `calls` on `stream` as the group's next collective. Throws like `check`. What is recorded into a
  /// graph is not watched when it is replayed: what comes behind it on the stream is.
  void run(const char* name, cudaStream_t stream, const std::function<void(ncclComm_t)>& calls);
  /// Waits until all collectives have ended, here and on every other rank that lives, then lets the group go; the
  /// others may keep theirs. Throws like `check`.
  void finish();

 private:
  struct Collective {
    std::string name;
    int64_t sequence;
    CudaEvent begin;
    CudaEvent end;
    std::optional<LivedClock::Time> begun;  ///< when the stream was seen to have come to it
  };

  /// A collective that the host is in.
  struct Launch {
    std::string name;
    int64_t sequence;
    LivedClock::Time begun;
  };

  /// What makes the watch give up.
  struct Trouble {
    std::string reason;
    int64_t first;  ///< collective that may be the one
    int64_t last;
  };

  void follow_streams(int device);
  void look_at_streams();
  void watch();
  void exchange_signs();
  void hear_of_failures();
  std::optional<Trouble> look();
  /// False when there is no more to do.
  bool pause();
  void fail(const Trouble& trouble);
  void announce(const NcclFailure& failure);
  void end_with(const NcclFailure& failure);

  NcclGroup& group_;
  NcclHeartbeats& heartbeats_;
  const NcclFamily& family_;
  std::chrono::milliseconds deadline_;
  std::chrono::milliseconds heartbeat_;
  std::function<void()> on_failure_;
  LivedClock lived_;              ///< advanced by the watcher
  LivedClock::Time next_sign_{};  ///< of the watcher alone, as is
  bool said_good_bye_ = false;    ///< the last sign, for which the others may be waiting
  std::timed_mutex group_mutex_;  ///< held by whoever calls the group
  std::mutex mutex_;              ///< guards what follows
  std::condition_variable changed_;
  std::deque<Collective> running_;
  int64_t started_ = 0;
  std::optional<Launch> launching_;
  bool recorded_ = false;   ///< some into a graph, of whose replays nobody knows how far they are
  bool leaving_ = false;    ///< `finish` waits for the other ranks
  bool all_ended_ = false;  ///< on all of them, while leaving
  LivedClock::Time looked_{};  ///< when CUDA last answered
  std::optional<Trouble> trouble_;
  std::optional<NcclFailure> failure_;
  bool stop_ = false;
  // The last members: they use all others.
  std::thread follower_;
  std::thread watcher_;
};

}  // namespace anabranch
