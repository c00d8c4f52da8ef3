#include "support/thread_team.h"

#include <chrono>

#include "support/check.h"

namespace anabranch {
namespace {

constexpr int kParts = 128;
constexpr std::chrono::milliseconds kPatience{1};

}  // namespace

ThreadTeam::ThreadTeam(int threads, const std::function<void()>& begin) {
  check_input(threads >= 0 && threads < kParts, "a team has 0 to ", kParts - 1, " threads, not ",
              threads);
  for (int index = 1; index <= threads; ++index) {
    threads_.emplace_back([this, index, begin] { work(index, begin); });
  }
}

ThreadTeam::~ThreadTeam() {
  job_.store((job_.load() / kParts + 1) * kParts, std::memory_order_release);
  job_.notify_all();
  for (std::thread& thread : threads_) {
    thread.join();
  }
}

void ThreadTeam::run(int parts, const std::function<void(int)>& part) {
  check_input(parts >= 1 && parts <= static_cast<int>(threads_.size()) + 1, "a team of ",
              threads_.size(), " threads does not do ", parts, " parts at once");
  part_ = &part;
  working_.store(parts - 1, std::memory_order_relaxed);
  constexpr int kNumbers = 1 << 20;  // of jobs, before they repeat
  const int number = (job_.load(std::memory_order_relaxed) / kParts + 1) % kNumbers;
  job_.store(number * kParts + parts, std::memory_order_release);
  job_.notify_all();
  part(0);
  while (working_.load(std::memory_order_acquire) > 0) {
    std::this_thread::yield();
  }
}

void ThreadTeam::work(int index, const std::function<void()>& begin) {
  begin();
  // A thread without a part in a job may miss it; one with a part is waited for.
  int job = 0;
  while ((job = next_job(job)) % kParts != 0) {
    if (index < job % kParts) {
      (*part_)(index);
      working_.fetch_sub(1, std::memory_order_release);
    }
  }
}

int ThreadTeam::next_job(int last) const {
  const auto patience_ends = std::chrono::steady_clock::now() + kPatience;
  int job = last;
  while ((job = job_.load(std::memory_order_acquire)) == last) {
    if (std::chrono::steady_clock::now() < patience_ends) {
      std::this_thread::yield();
    } else {
      job_.wait(last, std::memory_order_acquire);
    }
  }
  return job;
}

}  // namespace anabranch
