#pragma once

#include <condition_variable>
#include <list>
#include <mutex>

namespace anabranch {

/// A thread that calls MPI for messages that nobody waits for: MPI moves them while it is called. It
/// sleeps where there are none, and between its calls, so that it takes little of a core. Lives until the
/// process ends.
class MpiProgress {
 public:
  /// What there is to be done for the messages of one exchange.
  class Task {
   public:
    virtual ~Task() = default;
    /// Does what can be done now; `first`: all exchanges before it have been sent. Throws nothing: what has
    /// gone wrong is told to whoever waits.
    virtual void go_on(bool first) noexcept = 0;
    /// For any thread.
    virtual bool has_been_sent() const = 0;
  };

  MpiProgress();
  MpiProgress(const MpiProgress&) = delete;
  MpiProgress& operator=(const MpiProgress&) = delete;

  void add(Task& task);
  /// The thread leaves the task to the caller; those behind it still wait for it to be sent.
  void take(Task& task);
  void remove(Task& task);
  bool has_tasks() const;

 private:
  [[noreturn]] void work();

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  struct Entry {
    Task* task;
    bool taken;
  };
  std::list<Entry> tasks_;  ///< in the order of their exchanges
};

}  // namespace anabranch
