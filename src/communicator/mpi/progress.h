#pragma once

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace anabranch {

class MpiMessages;

/// A thread that calls MPI for messages that nobody waits for: MPI moves them while it is called. It
/// sleeps where there are none, and between its calls, so that it takes little of a core.
class MpiProgress {
 public:
  MpiProgress();
  ~MpiProgress();
  MpiProgress(const MpiProgress&) = delete;
  MpiProgress& operator=(const MpiProgress&) = delete;

  /// While it lives the thread polls `messages`, and nobody else does. What goes wrong with them goes
  /// wrong again when they are polled next.
  class Turn {
   public:
    Turn(MpiProgress& progress, MpiMessages& messages);
    ~Turn();
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

   private:
    MpiProgress& progress_;
    MpiMessages& messages_;
  };

 private:
  void work();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<MpiMessages*> under_way_;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace anabranch
