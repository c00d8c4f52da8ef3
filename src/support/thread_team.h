#pragma once

#include <atomic>
#include <functional>
#include <thread>
#include <vector>

namespace anabranch {

/// Threads that do one job together, a part each. After a job they look out for the next one for a
/// millisecond, as OpenMP's do, before they sleep: to wake a thread can take longer than its part.
class ThreadTeam {
 public:
  /// `threads` besides the calling one, at most 127; each begins with `begin`.
  ThreadTeam(int threads, const std::function<void()>& begin);
  ~ThreadTeam();
  ThreadTeam(const ThreadTeam&) = delete;
  ThreadTeam& operator=(const ThreadTeam&) = delete;

  /// Runs part(0) on the calling thread, part(1) .. part(parts − 1) on the team's, and returns when all
  /// have ended. At least 1 part, at most one more than there are threads; none may throw. One call at
  /// a time.
  void run(int parts, const std::function<void(int)>& part);

 private:
  void work(int index, const std::function<void()>& begin);
  int next_job(int last) const;

  const std::function<void(int)>* part_ = nullptr;
  std::atomic<int> job_ = 0;  ///< kParts · its number + its parts; no parts: the end
  std::atomic<int> working_ = 0;
  std::vector<std::thread> threads_;
};

}  // namespace anabranch
