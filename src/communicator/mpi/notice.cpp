#include "communicator/mpi/notice.h"

#include <algorithm>
#include <list>
#include <thread>

#include "communicator/waiting_time.h"

namespace anabranch {
namespace {

/// Tags of data are larger.
constexpr int kNoticeTag = 0;
/// How long a rank that has failed tries to tell the others.
constexpr std::chrono::milliseconds kLongestFarewell(200);

struct Outgoing {
  MpiNotice notice;
  MPI_Request request = MPI_REQUEST_NULL;
};

/// Notices on their way, some of them for ever: to dead ranks. Never destroyed, as MPI reads them.
/// Used under the runtime's mutex.
std::list<Outgoing>& outbox() {
  static auto* notices = new std::list<Outgoing>;
  return *notices;
}

/// Whether every notice has left, or been lost; forgets those.
bool all_sent(MpiRuntime& runtime) {
  const std::lock_guard lock(runtime.mutex());
  for (auto outgoing = outbox().begin(); outgoing != outbox().end();) {
    int sent = 0;
    const bool lost = MPI_Test(&outgoing->request, &sent, MPI_STATUS_IGNORE) != MPI_SUCCESS;
    outgoing = lost || sent != 0 ? outbox().erase(outgoing) : std::next(outgoing);
  }
  return outbox().empty();
}

}  // namespace

void MpiNotice::set_ranks(const std::vector<int>& values) {
  num_ranks = static_cast<int32_t>(std::min(values.size(), kMaxRanks));
  std::copy_n(values.begin(), num_ranks, ranks.begin());
}

void MpiNotice::set_text(const std::string& value) {
  text = {};
  std::copy_n(value.begin(), std::min(value.size(), text.size() - 1), text.begin());
}

void send_mpi_notice(MpiRuntime& runtime, int rank, const MpiNotice& notice) {
  const std::lock_guard lock(runtime.mutex());
  outbox().push_back({notice});
  Outgoing& outgoing = outbox().back();
  ANABRANCH_CHECK_MPI(MPI_Isend(&outgoing.notice, sizeof(MpiNotice), MPI_BYTE, rank, kNoticeTag,
                                runtime.comm(), &outgoing.request));
}

std::optional<ReceivedMpiNotice> receive_mpi_notice(MpiRuntime& runtime) {
  const std::lock_guard lock(runtime.mutex());
  int found = 0;
  MPI_Status status;
  ANABRANCH_CHECK_MPI(MPI_Iprobe(MPI_ANY_SOURCE, kNoticeTag, runtime.comm(), &found, &status));
  if (found == 0) {
    return std::nullopt;
  }
  // Small enough to have come whole, so receiving does not wait.
  ReceivedMpiNotice received;
  received.source = status.MPI_SOURCE;
  ANABRANCH_CHECK_MPI(MPI_Recv(&received.notice, sizeof(MpiNotice), MPI_BYTE, status.MPI_SOURCE,
                               kNoticeTag, runtime.comm(), MPI_STATUS_IGNORE));
  return received;
}

void announce_failure(MpiRuntime& runtime, const MpiFailure& failure) {
  runtime.set_failure(failure);
  MpiNotice notice;
  notice.kind = MpiNotice::Kind::kFailure;
  notice.set_ranks(failure.culprits);
  notice.set_text(failure.text);
  for (int rank = 0; rank < runtime.size(); ++rank) {
    try {
      if (rank != runtime.rank()) {
        send_mpi_notice(runtime, rank, notice);
      }
    } catch (const MpiError&) {
      // It is dead, or ends at its own deadline.
    }
  }
  WaitingTime farewell;
  while (!all_sent(runtime) && farewell.so_far() < kLongestFarewell) {
    std::this_thread::yield();
  }
}

}  // namespace anabranch
