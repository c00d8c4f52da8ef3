#include "communicator/nccl/group.h"

#include <anabranch/error.h>

#include <thread>

namespace anabranch {

void check_nccl(ncclResult_t result, const char* call, std::source_location place) {
  if (result != ncclSuccess && result != ncclInProgress) [[unlikely]] {
    const std::string cause = ncclGetErrorString(result);
    throw NcclError(call, result, cause + " (" + ncclGetLastError(nullptr) + ")", place);
  }
}

NcclGroup::NcclGroup(const ncclUniqueId& id, int rank, int size, const KeepWaiting& keep_waiting,
                     Waiting waiting) {
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  ncclComm_t meeting = nullptr;
  ncclComm_t working = nullptr;
  check_nccl(ncclCommInitRankConfig(&meeting, size, id, rank, &config), "ncclCommInitRankConfig");
  try {
    await(meeting, "ncclCommInitRankConfig", keep_waiting);
    if (waiting == Waiting::kCallsBack) {
      keep_waiting_ = keep_waiting;
      comm_ = meeting;
      return;
    }
    // A communicator that does not block makes a thread for every launch, about 0.1 ms. The one that
    // works blocks; what makes it, the one in which the ranks have met, does not.
    config.blocking = 1;
    check_nccl(ncclCommSplit(meeting, 0, rank, &working, &config), "ncclCommSplit");
    await(meeting, "ncclCommSplit", keep_waiting);
  } catch (...) {
    static_cast<void>(ncclCommAbort(meeting));
    throw;
  }
  comm_ = working;
  static_cast<void>(ncclCommAbort(meeting));  // nothing runs in it
}

NcclGroup::~NcclGroup() { abort(); }

void NcclGroup::launch(const std::function<void(ncclComm_t)>& calls) {
  check_nccl(ncclGroupStart(), "ncclGroupStart");
  try {
    calls(comm_);
  } catch (...) {
    static_cast<void>(ncclGroupEnd());
    throw;
  }
  check_nccl(ncclGroupEnd(), "ncclGroupEnd");
  if (keep_waiting_) {
    await(comm_, "ncclGroupEnd", keep_waiting_);
  }
}

std::string NcclGroup::asynchronous_error() const {
  ncclResult_t state = ncclSuccess;
  const ncclResult_t answer = ncclCommGetAsyncError(comm_, &state);
  if (answer != ncclSuccess) {
    state = answer;
  }
  if (state == ncclSuccess || state == ncclInProgress) {
    return "";
  }
  return std::string(ncclGetErrorString(state)) + " (" + ncclGetLastError(comm_) + ")";
}

void NcclGroup::finalize() {
  const ncclComm_t comm = comm_.exchange(nullptr);
  check_nccl(ncclCommFinalize(comm), "ncclCommFinalize");
  if (keep_waiting_) {
    await(comm, "ncclCommFinalize", keep_waiting_);
  }
  check_nccl(ncclCommDestroy(comm), "ncclCommDestroy");
}

void NcclGroup::abort() noexcept {
  if (const ncclComm_t comm = comm_.exchange(nullptr)) {
    static_cast<void>(ncclCommAbort(comm));
  }
}

void NcclGroup::await(ncclComm_t comm, const char* call, const KeepWaiting& keep_waiting) {
  ncclResult_t state = ncclInProgress;
  for (;;) {
    check_nccl(ncclCommGetAsyncError(comm, &state), "ncclCommGetAsyncError");
    if (state != ncclInProgress) {
      check_nccl(state, call);
      return;
    }
    keep_waiting();
    std::this_thread::yield();
  }
}

}  // namespace anabranch
