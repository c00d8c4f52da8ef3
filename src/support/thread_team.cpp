#include "support/thread_team.h"

#include <chrono>

#include "support/check.h"

namespace anabranch {
namespace {

using Clock = std::chrono::steady_clock;
constexpr std::chrono::milliseconds kPatience{1};

/// Waits until `jobs` is no longer `done`.
void wait_for_job(const std::atomic<unsigned>& jobs, unsigned done) {
  const auto patience_ends = Clock::now() + kPatience;
  while (jobs.load(std::memory_order_acquire) == done) {
    if (Clock::now() < patience_ends) {
      std::this_thread::yield();
    } else {
      jobs.wait(done, std::memory_order_acquire);
    }
  }
}

}  // namespace

ThreadTeam::ThreadTeam(int threads, const std::function<void()>& begin) {
  check_input(threads >= 0, "a team has no ", threads, " threads");
  for (int index = 0; index < threads; ++index) {
    members_.push_back(std::make_unique<Member>());
  }
  for (int index = 0; index < threads; ++index) {
    members_[index]->thread = std::thread([this, index, begin] { work(index, begin); });
  }
}

ThreadTeam::~ThreadTeam() {
  part_ = nullptr;
  give_job(static_cast<int>(members_.size()));
  for (const auto& member : members_) {
    member->thread.join();
  }
}

void ThreadTeam::run(int parts, const std::function<void(int)>& part) {
  check_input(parts >= 1 && parts <= static_cast<int>(members_.size()) + 1, "a team of ",
              members_.size(), " threads does not do ", parts, " parts at once");
  part_ = &part;
  working_.store(parts - 1, std::memory_order_relaxed);
  give_job(parts - 1);
  part(0);
  while (working_.load(std::memory_order_acquire) > 0) {
    std::this_thread::yield();
  }
}

void ThreadTeam::give_job(int members) {
  for (int index = 0; index < members; ++index) {
    auto& jobs = members_[index]->jobs;
    jobs.fetch_add(1, std::memory_order_release);
    jobs.notify_one();
  }
}

void ThreadTeam::work(int index, const std::function<void()>& begin) {
  begin();
  for (unsigned done = 0;; ++done) {
    wait_for_job(members_[index]->jobs, done);
    if (part_ == nullptr) {
      return;
    }
    (*part_)(index + 1);
    working_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace anabranch
