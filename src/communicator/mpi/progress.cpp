#include "communicator/mpi/progress.h"

#include <chrono>
#include <thread>

namespace anabranch {
namespace {

/// A call that takes longer has moved something, and the next one may as well.
constexpr std::chrono::microseconds kIdleCall(5);
/// Much less than the time in which a fast link empties a socket's buffers.
constexpr std::chrono::microseconds kPause(20);

}  // namespace

MpiProgress::MpiProgress() {
  std::thread([this] { work(); }).detach();
}

void MpiProgress::add(Task& task) {
  {
    const std::lock_guard lock(mutex_);
    tasks_.push_back({&task, /*taken=*/false});
  }
  changed_.notify_all();
}

void MpiProgress::take(Task& task) {
  const std::lock_guard lock(mutex_);
  for (Entry& entry : tasks_) {
    entry.taken = entry.taken || entry.task == &task;
  }
}

void MpiProgress::remove(Task& task) {
  const std::lock_guard lock(mutex_);
  std::erase_if(tasks_, [&](const Entry& entry) { return entry.task == &task; });
}

bool MpiProgress::has_tasks() const {
  const std::lock_guard lock(mutex_);
  return !tasks_.empty();
}

void MpiProgress::work() {
  using Clock = std::chrono::steady_clock;
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [&] { return !tasks_.empty(); });
    const auto begin = Clock::now();
    bool first = true;
    for (const Entry& entry : tasks_) {
      if (!entry.taken) {
        entry.task->go_on(first);
      }
      first = first && entry.task->has_been_sent();
    }
    const bool idle = Clock::now() - begin < kIdleCall;
    lock.unlock();
    if (idle) {
      std::this_thread::sleep_for(kPause);
    } else {
      std::this_thread::yield();  // to whoever waits for the lock
    }
    lock.lock();
  }
}

}  // namespace anabranch
