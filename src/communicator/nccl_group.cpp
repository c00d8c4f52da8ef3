#include "communicator/nccl_group.h"

#include <stdexcept>
#include <thread>

namespace anabranch {

void check_nccl(ncclResult_t result, const char* call, std::source_location place) {
  if (result != ncclSuccess && result != ncclInProgress) [[unlikely]] {
    throw std::runtime_error(std::string(call) + " failed: " + ncclGetErrorString(result) + " (" +
                             ncclGetLastError(nullptr) + ") at " + place.file_name() + ":" +
                             std::to_string(place.line()));
  }
}

NcclGroup::NcclGroup(const ncclUniqueId& id, int rank, int size, std::chrono::milliseconds deadline)
    : deadline_(deadline) {
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  check_nccl(ncclCommInitRankConfig(&comm_, size, id, rank, &config), "ncclCommInitRankConfig");
  try {
    await("ncclCommInitRankConfig");
  } catch (...) {
    abort();
    throw;
  }
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
  await("ncclGroupEnd");
}

std::string NcclGroup::asynchronous_error() const {
  ncclResult_t state = ncclSuccess;
  check_nccl(ncclCommGetAsyncError(comm_, &state), "ncclCommGetAsyncError");
  if (state == ncclSuccess || state == ncclInProgress) {
    return "";
  }
  return std::string(ncclGetErrorString(state)) + " (" + ncclGetLastError(comm_) + ")";
}

void NcclGroup::abort() noexcept {
  if (comm_ != nullptr) {
    static_cast<void>(ncclCommAbort(comm_));
    comm_ = nullptr;
  }
}

void NcclGroup::await(const char* call) {
  const auto begin = std::chrono::steady_clock::now();
  ncclResult_t state = ncclInProgress;
  for (;;) {
    check_nccl(ncclCommGetAsyncError(comm_, &state), "ncclCommGetAsyncError");
    if (state != ncclInProgress) {
      check_nccl(state, call);
      return;
    }
    if (std::chrono::steady_clock::now() - begin > deadline_) {
      throw std::runtime_error(std::string(call) + " is still in progress after " +
                               std::to_string(deadline_.count()) + " ms");
    }
    std::this_thread::yield();
  }
}

}  // namespace anabranch
