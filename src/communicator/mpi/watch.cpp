#include "communicator/mpi/watch.h"

#include <anabranch/error.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <thread>

#include "communicator/errors.h"
#include "communicator/mpi/notice.h"

namespace anabranch {
namespace {

using std::chrono::milliseconds;

/// A rank that has waited for less does not look at notices: collectives usually end sooner.
constexpr milliseconds kQuietTime(100);
/// The longest time before the deadline at which a rank starts to ask.
constexpr milliseconds kLongestInquiry(2000);

bool contains(const std::vector<int>& ranks, int rank) {
  return std::find(ranks.begin(), ranks.end(), rank) != ranks.end();
}

/// What the threads of this process wait in, each by the number of its question, and the answers that have
/// come to it.
struct Threads {
  struct Waiting {
    MpiWait wait;
    std::map<int, std::vector<MpiWait>> answers;
  };
  std::mutex mutex;
  std::map<int32_t, Waiting> waiting;
};

Threads& threads() {
  static auto* const all = new Threads;  // waits may outlive static objects
  return *all;
}

}  // namespace

void refuse_after(const MpiFailure& failure, const MpiGroup& group, int rank, Collective call) {
  throw CommunicationError(
      c10::str(group.describe({rank}), ": ", name_of(call), " given up: ", failure.text),
      group.ranks_of(failure.culprits));
}

MpiWatch::MpiWatch(MpiRuntime& runtime, const MpiGroup& group, MpiCallId call,
                   milliseconds deadline)
    : runtime_(runtime), group_(group), call_(call), deadline_(deadline) {
  static std::atomic<int32_t> questions = 0;
  question_ = ++questions;
}

MpiWatch::~MpiWatch() {
  const std::lock_guard lock(threads().mutex);
  threads().waiting.erase(question_);
}

void MpiWatch::keep_waiting(const std::function<std::vector<int>()>& pending) {
  const auto waited = waiting_.so_far();
  if (waited >= std::min(kQuietTime, deadline_ / 4)) {
    const std::vector<int> ranks = pending();
    listen(ranks);
    if (waited >= deadline_ - std::min(kLongestInquiry, deadline_ / 4)) {
      ask(ranks);
      for (const auto& [rank, waits] : answers_) {
        for (const MpiWait& wait : waits) {
          ask(wait.waits_for);
        }
      }
    }
    if (waited >= deadline_) {
      give_up(ranks);
    }
  }
  std::this_thread::yield();
}

void MpiWatch::listen(const std::vector<int>& pending) {
  {
    const std::lock_guard lock(threads().mutex);
    threads().waiting[question_].wait = {call_, pending};
  }
  while (const auto received = receive_mpi_notice(runtime_)) {
    const MpiNotice& notice = received->notice;
    if (notice.kind == MpiNotice::Kind::kQuestion) {
      answer(received->source, notice.question);
    } else if (notice.kind == MpiNotice::Kind::kAnswer) {
      const MpiCallId call{notice.group, static_cast<Collective>(notice.call), notice.sequence};
      const std::lock_guard lock(threads().mutex);
      const auto asked = threads().waiting.find(notice.question);
      if (asked != threads().waiting.end()) {
        asked->second.answers[received->source].push_back({call, notice.get_ranks()});
      }
    } else if (notice.kind == MpiNotice::Kind::kFailure) {
      announce_failure(runtime_, {notice.text.data(), notice.get_ranks()});
      break;
    }
  }
  if (const auto failure = runtime_.failure()) {  // of this call's, or another thread's
    refuse_after(*failure, group_, runtime_.rank(), call_.collective);
  }
  const std::lock_guard lock(threads().mutex);
  answers_ = threads().waiting[question_].answers;
}

/// For all threads.
void MpiWatch::answer(int rank, int32_t question) {
  std::vector<MpiWait> waits;
  {
    const std::lock_guard lock(threads().mutex);
    for (const auto& [number, waiting] : threads().waiting) {
      waits.push_back(waiting.wait);
    }
  }
  for (const MpiWait& wait : waits) {
    MpiNotice notice;
    notice.kind = MpiNotice::Kind::kAnswer;
    notice.question = question;
    notice.group = wait.call.group;
    notice.call = static_cast<int32_t>(wait.call.collective);
    notice.sequence = wait.call.sequence;
    notice.set_ranks(wait.waits_for);
    send_mpi_notice(runtime_, rank, notice);
  }
}

void MpiWatch::ask(const std::vector<int>& ranks) {
  MpiNotice question;
  question.question = question_;
  for (const int rank : ranks) {
    if (rank != runtime_.rank() && asked_.insert(rank).second) {
      send_mpi_notice(runtime_, rank, question);
    }
  }
}

/// Those waited for, directly or by way of others that have answered.
std::vector<int> MpiWatch::reached_from(const std::vector<int>& pending) const {
  std::vector<int> reached = pending;
  for (size_t i = 0; i < reached.size(); ++i) {
    const auto answer = answers_.find(reached[i]);
    if (answer == answers_.end()) {
      continue;
    }
    for (const MpiWait& wait : answer->second) {
      for (const int rank : wait.waits_for) {
        if (rank != runtime_.rank() && !contains(reached, rank)) {
          reached.push_back(rank);
        }
      }
    }
  }
  return reached;
}

void MpiWatch::give_up(const std::vector<int>& pending) {
  std::vector<int> silent;
  std::vector<int> elsewhere;
  for (const int rank : reached_from(pending)) {
    const auto answer = answers_.find(rank);
    if (answer == answers_.end()) {
      silent.push_back(rank);
    } else if (std::none_of(answer->second.begin(), answer->second.end(),
                            [&](const MpiWait& wait) { return wait.call == call_; })) {
      elsewhere.push_back(rank);
    }
  }

  const std::string waited =
      c10::str("waited ", in_seconds(deadline_), " for ", group_.describe(pending));
  if (silent == pending) {
    fail(waited + " (dead or stalled)", silent);
  } else if (!silent.empty()) {
    fail(c10::str(waited, ", held up by ", group_.describe(silent), " (dead or stalled)"), silent);
  } else if (!elsewhere.empty()) {
    const MpiCallId& other = answers_.at(elsewhere.front()).front().call;
    if (other.group == kNoMpiGroup) {
      fail(c10::str(waited, ": ", group_.describe({elsewhere.front()}),
                    " has come to the end of its program"),
           {elsewhere.front()});
    }
    fail(c10::str(waited, ": the ranks do not make the same calls, this is call ", call_.sequence,
                  ", but ", group_.describe({elsewhere.front()}), " waits in call ", other.sequence,
                  ", ", name_of(other.collective),
                  other.group == call_.group ? "" : ", of another group"),
         elsewhere);
  }
  fail(waited + " (alive, but the messages do not come through)", pending);
}

void MpiWatch::fail(const std::string& reason, const std::vector<int>& culprits) {
  const std::string text =
      c10::str(group_.describe({runtime_.rank()}), ": ", name_of(call_.collective), " ", reason);
  announce_failure(runtime_, {text, culprits});
  throw CommunicationError(text, group_.ranks_of(culprits));
}

}  // namespace anabranch
