#include "communicator/mpi/runtime.h"

#include <anabranch/error.h>
#include <c10/util/StringUtil.h>
#if __has_include(<mpi-ext.h>)
#include <mpi-ext.h>
#endif
#include <signal.h>
#include <stdlib.h>  // on_exit
#include <unistd.h>

#include <cstdio>
#include <memory>
#include <thread>

#include "communicator/describe.h"
#include "communicator/mpi/notice.h"
#include "communicator/mpi/watch.h"
#include "communicator/waiting_time.h"

namespace anabranch {
namespace {

MpiRuntime* running = nullptr;

/// What `leave` has to know.
struct Process {
  pid_t id = getpid();
  bool finalise = false;  ///< MPI was initialised here
};

/// Waits until every rank is at its exit, so that finalising finds them all: MPI_Finalize waits for
/// them without a limit, sometimes also for those that have failed. False if one has failed. A rank
/// that calls this one within the deadline has failed within twice the deadline; then it is MPI's
/// turn.
bool all_leave(MpiRuntime& runtime) {
  MPI_Request request = MPI_REQUEST_NULL;
  {
    const std::lock_guard lock(runtime.mutex());
    ANABRANCH_CHECK_MPI(MPI_Ibarrier(runtime.comm(), &request));
  }
  WaitingTime waiting;
  int done = 0;
  while (done == 0 && waiting.so_far() < 2 * runtime.deadline()) {
    while (const auto received = receive_mpi_notice(runtime)) {
      if (received->notice.kind == MpiNotice::Kind::kFailure) {
        return false;
      }
      if (received->notice.kind == MpiNotice::Kind::kQuestion) {
        MpiNotice answer;
        answer.kind = MpiNotice::Kind::kAnswer;
        answer.question = received->notice.question;  // of no group's call
        send_mpi_notice(runtime, received->source, answer);
      }
    }
    {
      const std::lock_guard lock(runtime.mutex());
      ANABRANCH_CHECK_MPI(MPI_Test(&request, &done, MPI_STATUS_IGNORE));
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(done ? 0 : 1));
  }
  return true;
}

/// Ends MPI at exit.
void leave(int status, void* argument) {
  const auto* process = static_cast<const Process*>(argument);
  int finalised = 0;
  const bool usable = MPI_Finalized(&finalised) == MPI_SUCCESS && finalised == 0;
  const bool forked = getpid() != process->id;
  if (!usable || forked || running == nullptr || running->failure()) {
    return;
  }
  if (status != 0) {
    const int rank = running->rank();
    announce_failure(*running,
                     {c10::str("rank ", rank, " has exited with status ", status), {rank}});
    return;
  }
  try {
    if (process->finalise && all_leave(*running)) {
      MPI_Finalize();
    }
  } catch (const MpiError& error) {
    std::fprintf(stderr, "anabranch: MPI is not finalised: %s\n", error.what());
  }
}

/// Writing to the socket of a dead peer is to be an error of that call, not the end of this process
/// without a word.
void survive_broken_connections() {
  struct sigaction action = {};
  if (sigaction(SIGPIPE, nullptr, &action) == 0 && action.sa_handler == SIG_DFL) {
    action.sa_handler = SIG_IGN;
    sigaction(SIGPIPE, &action, nullptr);
  }
}

/// The level of threads that MPI takes.
int initialise() {
  int initialised = 0;
  ANABRANCH_CHECK_MPI(MPI_Initialized(&initialised));
  int level = MPI_THREAD_SINGLE;
  if (initialised != 0) {
    ANABRANCH_CHECK_MPI(MPI_Query_thread(&level));
  } else {
    ANABRANCH_CHECK_MPI(MPI_Init_thread(nullptr, nullptr, MPI_THREAD_MULTIPLE, &level));
  }
  static Process process;
  process.finalise = initialised == 0;
  if (on_exit(leave, &process) != 0) {
    throw std::runtime_error("on_exit refused the handler that ends MPI");
  }
  if (level < MPI_THREAD_SERIALIZED) {
    throw std::runtime_error(
        "MPI runs below MPI_THREAD_SERIALIZED, but backward may communicate from another thread: "
        "initialise it by MPI_Init_thread with MPI_THREAD_MULTIPLE, or leave that to anabranch");
  }
  return level;
}

}  // namespace

void check_mpi(int code, const char* call, const char* file, int line) {
  if (code == MPI_SUCCESS) [[likely]] {
    return;
  }
  char text[MPI_MAX_ERROR_STRING] = {};
  int length = 0;
  if (MPI_Error_string(code, text, &length) != MPI_SUCCESS) {
    length = 0;
  }
  throw MpiError(c10::str(call, " failed: ", std::string(text, length), " (code ", code, ") at ",
                          file, ":", line));
}

bool mpi_is_cuda_aware() {
#ifdef MPIX_CUDA_AWARE_SUPPORT
  return MPIX_Query_cuda_support() == 1;
#else
  return false;
#endif
}

std::string describe_mpi() {
  char text[MPI_MAX_LIBRARY_VERSION_STRING] = {};
  int length = 0;
  ANABRANCH_CHECK_MPI(MPI_Get_library_version(text, &length));
  const std::string version(text, length);
  return c10::str("MPI: ", version.substr(0, version.find_first_of(",\n")), ", ",
                  mpi_is_cuda_aware() ? "CUDA-aware" : "not CUDA-aware: GPU memory is staged");
}

MpiRuntime& MpiRuntime::get(std::chrono::milliseconds deadline) {
  static std::mutex once;
  const std::lock_guard lock(once);
  if (running == nullptr) {
    // Never destroyed: communicators may outlive static objects, and MPI may still write into what
    // was abandoned.
    running = new MpiRuntime(deadline);
  }
  return *running;
}

MpiRuntime::MpiRuntime(std::chrono::milliseconds deadline) : deadline_(deadline) {
  takes_threads_ = initialise() == MPI_THREAD_MULTIPLE;
  survive_broken_connections();
  duplicate_world(deadline);
  ANABRANCH_CHECK_MPI(MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN));
  ANABRANCH_CHECK_MPI(MPI_Comm_rank(comm_, &rank_));
  ANABRANCH_CHECK_MPI(MPI_Comm_size(comm_, &size_));
  int* limit = nullptr;
  int found = 0;
  ANABRANCH_CHECK_MPI(MPI_Comm_get_attr(comm_, MPI_TAG_UB, static_cast<void*>(&limit), &found));
  if (found == 0) {
    throw MpiError("MPI_Comm_get_attr knows no MPI_TAG_UB");
  }
  tag_limit_ = *limit;
}

void MpiRuntime::duplicate_world(std::chrono::milliseconds deadline) {
  // The result lands in memory that outlives a failure, should MPI write it late.
  static MPI_Comm duplicate = MPI_COMM_NULL;
  MPI_Request request = MPI_REQUEST_NULL;
  ANABRANCH_CHECK_MPI(MPI_Comm_idup(MPI_COMM_WORLD, &duplicate, &request));
  WaitingTime waiting;
  int done = 0;
  while (done == 0) {
    ANABRANCH_CHECK_MPI(MPI_Test(&request, &done, MPI_STATUS_IGNORE));
    if (waiting.so_far() >= deadline) {
      throw CommunicationError(c10::str("make_mpi_communicator waited ", in_seconds(deadline),
                                        " for other ranks (dead, stalled, or not calling it)"),
                               {});
    }
    std::this_thread::yield();
  }
  comm_ = duplicate;
}

std::optional<MpiFailure> MpiRuntime::failure() {
  const std::lock_guard lock(failure_mutex_);
  return failure_;
}

void MpiRuntime::set_failure(const MpiFailure& failure) {
  const std::lock_guard lock(failure_mutex_);
  if (!failure_) {
    failure_ = failure;
  }
}

MpiProgress* MpiRuntime::progress() {
  if (takes_threads_) {
    // Never destroyed, as the runtime: it may be asleep when the process ends.
    std::call_once(progress_begins_, [&] { progress_ = new MpiProgress; });
  }
  return progress_;
}

void MpiRuntime::abandon(std::vector<MPI_Request> requests, Messages messages) {
  const std::lock_guard lock(failure_mutex_);
  abandoned_.push_back({std::move(requests), std::move(messages)});
}

}  // namespace anabranch
