#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace anabranch {

/// Threads that do one job together, a part each. Those that had a part look out for the next job for a
/// millisecond, as OpenMP's do, before they sleep: to wake a thread can take longer than its part.
class ThreadTeam {
 public:
  /// `threads` besides the calling one; each begins with `begin`.
  ThreadTeam(int threads, const std::function<void()>& begin);
  ~ThreadTeam();
  ThreadTeam(const ThreadTeam&) = delete;
  ThreadTeam& operator=(const ThreadTeam&) = delete;

  /// Runs part(0) on the calling thread, part(1) .. part(parts − 1) on the team's, and returns when all
  /// have ended. At least 1 part, at most one more than there are threads; none may throw. One call at
  /// a time.
  void run(int parts, const std::function<void(int)>& part);

 private:
  struct Member {
    std::atomic<unsigned> jobs = 0;  ///< that were given to it
    std::thread thread;
  };
  void give_job(int members);
  void work(int index, const std::function<void()>& begin);

  const std::function<void(int)>* part_ = nullptr;  ///< of the job; none: the end
  std::atomic<int> working_ = 0;
  std::vector<std::unique_ptr<Member>> members_;
};

}  // namespace anabranch
