#include "communicator/mpi/progress.h"

#include <algorithm>
#include <chrono>

#include "communicator/mpi/messages.h"

namespace anabranch {
namespace {

/// A call that takes longer has moved something, and the next one may as well.
constexpr std::chrono::microseconds kIdleCall(5);
/// Much less than the time in which a fast link empties a socket's buffers.
constexpr std::chrono::microseconds kPause(20);

}  // namespace

MpiProgress::MpiProgress() : thread_([this] { work(); }) {}

MpiProgress::~MpiProgress() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

MpiProgress::Turn::Turn(MpiProgress& progress, MpiMessages& messages)
    : progress_(progress), messages_(messages) {
  {
    const std::lock_guard lock(progress_.mutex_);
    progress_.under_way_.push_back(&messages_);
  }
  progress_.changed_.notify_all();
}

MpiProgress::Turn::~Turn() {
  const std::lock_guard lock(progress_.mutex_);
  std::erase(progress_.under_way_, &messages_);
}

void MpiProgress::work() {
  using Clock = std::chrono::steady_clock;
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [&] { return stop_ || !under_way_.empty(); });
    if (stop_) {
      return;
    }
    const auto begin = Clock::now();
    std::erase_if(under_way_, [](MpiMessages* messages) { return messages->poll_in_background(); });
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
