#include "communicator/nccl_group.h"

#include <stdexcept>
#include <thread>
#include <utility>

namespace anabranch {

void check_nccl(ncclResult_t result, const char* call, std::source_location place) {
  if (result != ncclSuccess && result != ncclInProgress) [[unlikely]] {
    throw std::runtime_error(std::string(call) + " failed: " + ncclGetErrorString(result) + " (" +
                             ncclGetLastError(nullptr) + ") at " + place.file_name() + ":" +
                             std::to_string(place.line()));
  }
}

NcclGroup::NcclGroup(const ncclUniqueId& id, int rank, int size, const KeepWaiting& keep_waiting) {
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  check_nccl(ncclCommInitRankConfig(&comm_, size, id, rank, &config), "ncclCommInitRankConfig");
  try {
    await("ncclCommInitRankConfig", keep_waiting);
  } catch (...) {
    abort();
    throw;
  }
}

NcclGroup::~NcclGroup() { abort(); }

void NcclGroup::launch(const std::function<void(ncclComm_t)>& calls,
                       const KeepWaiting& keep_waiting) {
  check_nccl(ncclGroupStart(), "ncclGroupStart");
  try {
    calls(comm_);
  } catch (...) {
    static_cast<void>(ncclGroupEnd());
    throw;
  }
  check_nccl(ncclGroupEnd(), "ncclGroupEnd");
  await("ncclGroupEnd", keep_waiting);
}

std::string NcclGroup::asynchronous_error() const {
  ncclResult_t state = ncclSuccess;
  check_nccl(ncclCommGetAsyncError(comm_, &state), "ncclCommGetAsyncError");
  if (state == ncclSuccess || state == ncclInProgress) {
    return "";
  }
  return std::string(ncclGetErrorString(state)) + " (" + ncclGetLastError(comm_) + ")";
}

void NcclGroup::finalize(const KeepWaiting& keep_waiting) {
  check_nccl(ncclCommFinalize(comm_), "ncclCommFinalize");
  await("ncclCommFinalize", keep_waiting);
  const ncclComm_t comm = std::exchange(comm_, nullptr);
  check_nccl(ncclCommDestroy(comm), "ncclCommDestroy");
}

void NcclGroup::abort() noexcept {
  if (comm_ != nullptr) {
    static_cast<void>(ncclCommAbort(comm_));
    comm_ = nullptr;
  }
}

void NcclGroup::await(const char* call, const KeepWaiting& keep_waiting) {
  ncclResult_t state = ncclInProgress;
  for (;;) {
    check_nccl(ncclCommGetAsyncError(comm_, &state), "ncclCommGetAsyncError");
    if (state != ncclInProgress) {
      check_nccl(state, call);
      return;
    }
    keep_waiting();
    std::this_thread::yield();
  }
}

}  // namespace anabranch
