#pragma once

#include <nccl.h>

#include <atomic>
#include <functional>
#include <source_location>
#include <string>

namespace anabranch {

#if NCCL_VERSION_CODE < NCCL_VERSION(2, 19, 0)
#error "anabranch needs NCCL 2.19 or newer"
#endif

/// Throws NcclError unless `result` is success or, as of a communicator that does not block, "in
/// progress".
void check_nccl(ncclResult_t result, const char* call,
                std::source_location place = std::source_location::current());

/// One ncclComm_t, owned. Making it does not block: while that is in progress `keep_waiting` is called
/// again and again, and throws when it has become vain, so that a peer that never comes cannot hold
/// this rank for good.
class NcclGroup {
 public:
  using KeepWaiting = std::function<void()>;
  enum class Waiting {
    kBlocks,     ///< a launch, while ranks first connect, and `finalize`; `abort` ends the launch
    kCallsBack,  ///< `keep_waiting`, then too; a launch takes about 0.1 ms more
  };

  /// Collective over `size` ranks with the same `id`.
  NcclGroup(const ncclUniqueId& id, int rank, int size, const KeepWaiting& keep_waiting,
            Waiting waiting);
  /// Aborts what is still running.
  ~NcclGroup();
  NcclGroup(const NcclGroup&) = delete;
  NcclGroup& operator=(const NcclGroup&) = delete;

  /// Runs `calls`, which launch on a stream, as one group.
  void launch(const std::function<void(ncclComm_t)>& calls);
  /// NCCL's word on what has failed in the background; empty if nothing has. Not beside `launch`.
  std::string asynchronous_error() const;
  /// Ends in peace, when all that was launched has ended. No launch may follow.
  void finalize();
  /// Ends everything in flight: streams go on with undefined data, and a launch that another thread is
  /// in fails. None may follow.
  void abort() noexcept;

 private:
  static void await(ncclComm_t comm, const char* call, const KeepWaiting& keep_waiting);

  KeepWaiting keep_waiting_;  ///< empty: calls block
  std::atomic<ncclComm_t> comm_ = nullptr;
};

}  // namespace anabranch
