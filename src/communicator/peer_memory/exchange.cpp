#include "communicator/peer_memory/exchange.h"

#include <c10/cuda/CUDAGuard.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <optional>

#include "communicator/agreement.h"
#include "communicator/host.h"
#include "communicator/peer_memory/goodbyes.h"
#include "communicator/transfer_rows.h"

namespace anabranch {
namespace {

/// As many rows as `counts` from each rank's first row on.
void set_ranges(const std::vector<int64_t>& counts, int64_t* begins, int64_t* rows) {
  int64_t begin = 0;
  for (size_t rank = 0; rank < counts.size(); ++rank) {
    begins[rank] = begin;
    rows[rank] = counts[rank];
    begin += counts[rank];
  }
}

peer::Rows rows_of(const Transfer& transfer) {
  peer::Rows rows = {};
  rows.source = static_cast<const std::byte*>(transfer.send.const_data_ptr());
  rows.index =
      transfer.send_index.defined() ? transfer.send_index.const_data_ptr<int64_t>() : nullptr;
  rows.target = static_cast<std::byte*>(transfer.receive.data_ptr());
  rows.row_bytes = row_bytes(transfer.send);
  if (transfer.counts.defined()) {
    rows.counts = transfer.counts.const_data_ptr<int64_t>();
    return rows;
  }
  set_ranges(transfer.send_rows, rows.send_begin, rows.send_rows);
  set_ranges(transfer.receive_rows, rows.receive_begin, rows.receive_rows);
  return rows;
}

}  // namespace

/// Memory of this GPU that the other ranks map.
struct PeerExchange::Mailbox {
  Mailbox(const peer::Layout& layout, std::shared_ptr<const Goodbyes> goodbyes)
      : goodbyes(std::move(goodbyes)), device(c10::cuda::current_device()) {
    void* allocated = nullptr;
    const auto bytes = static_cast<size_t>(layout.bytes());
    check_cuda(cudaMalloc(&allocated, bytes), "cudaMalloc");
    memory = static_cast<std::byte*>(allocated);
    const CudaStream stream = make_cuda_stream();
    check_cuda(cudaMemsetAsync(memory, 0, bytes, stream), "cudaMemsetAsync");
    check_cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  }
  Mailbox(const Mailbox&) = delete;
  Mailbox& operator=(const Mailbox&) = delete;
  ~Mailbox() { static_cast<void>(cudaFree(memory)); }

  std::string handle() const {
    cudaIpcMemHandle_t handle;
    check_cuda(cudaIpcGetMemHandle(&handle, memory), "cudaIpcGetMemHandle");
    return {handle.reserved, sizeof(handle.reserved)};
  }

  /// Unmaps what of others' is mapped, by owner.
  void unmap(std::vector<std::pair<int, std::byte*>>& others) const {
    const c10::cuda::CUDAGuard guard(device);
    for (const auto& [owner, mapped] : others) {
      check_cuda(cudaIpcCloseMemHandle(mapped), "cudaIpcCloseMemHandle");
      goodbyes->unmap(owner);
    }
    others.clear();
  }

  std::shared_ptr<const Goodbyes> goodbyes;
  c10::DeviceIndex device;
  std::byte* memory = nullptr;
};

/// A mailbox whose owner has left the group, and those that it had mapped. While others still exchange rows these stay:
/// to unmap is to wait for their kernels, where they run on the same GPU.
struct PeerExchange::Retired {
  std::shared_ptr<Mailbox> own;
  std::vector<std::pair<int, std::byte*>> mapped;

  /// Whether nothing is left to do.
  bool end() noexcept {
    if (!own->goodbyes->all_have_left()) return false;
    try {
      own->unmap(mapped);
    } catch (const std::runtime_error&) {
      return false;  // the GPU has failed: its next user will be told
    }
    return own->goodbyes->all_have_unmapped();
  }

  /// Unmaps and frees what can be, and keeps the rest for a later call. `newest`: one more, or nothing.
  static void sweep(std::optional<Retired> newest) {
    static std::mutex mutex;
    // Never destroyed: at exit CUDA may already be gone.
    static auto* retired = new std::vector<Retired>;
    const std::lock_guard lock(mutex);
    if (newest.has_value()) retired->push_back(*std::move(newest));
    std::erase_if(*retired, [](Retired& one) { return one.end(); });
  }
};

bool PeerExchange::suits(Communicator& bootstrap) {
  // Who keeps NCCL from mapping memory, because it does not work here, means us as well.
  const char* disabled = std::getenv("NCCL_P2P_DISABLE");
  const bool may = disabled == nullptr || std::string_view(disabled) == "0";
  const std::vector<std::string> hosts =
      all_gather_strings(bootstrap, may ? host_identity() : std::string());
  return !hosts[0].empty() && hosts.size() > 1 && hosts.size() <= peer::kMaxRanks &&
         std::all_of(hosts.begin(), hosts.end(),
                     [&](const auto& host) { return host == hosts[0]; });
}

std::unique_ptr<PeerExchange> PeerExchange::make(Communicator& bootstrap, std::string& obstacle) {
  Retired::sweep(std::nullopt);
  std::unique_ptr<PeerExchange> exchange;
  std::shared_ptr<const Goodbyes> goodbyes;
  try {
    goodbyes = std::make_shared<Goodbyes>(bootstrap);
  } catch (const std::runtime_error& error) {  // on all ranks alike
    obstacle = error.what();
    return nullptr;
  }
  obstacle = first_failure(run_together(bootstrap, [&] {
    exchange.reset(new PeerExchange(bootstrap, goodbyes));  // a private constructor
  }));
  if (obstacle.empty()) {
    obstacle = exchange->map(bootstrap);
  }
  if (!obstacle.empty()) {
    const auto mailbox = exchange == nullptr ? nullptr : exchange->own_;
    exchange.reset();
    bootstrap.barrier();  // all have closed the mailbox that is freed now
    return nullptr;
  }
  exchange->mapped_by_all_ = true;
  return exchange;
}

PeerExchange::PeerExchange(const Communicator& bootstrap, std::shared_ptr<const Goodbyes> goodbyes)
    : last_(make_cuda_event()) {
  arguments_.rank = bootstrap.rank();
  arguments_.layout = {bootstrap.size(), peer::lanes_for(bootstrap.size())};
  own_ = std::make_shared<Mailbox>(arguments_.layout, std::move(goodbyes));
  void* flag = nullptr;
  check_cuda(cudaHostAlloc(&flag, sizeof(int), cudaHostAllocPortable | cudaHostAllocMapped),
             "cudaHostAlloc");
  aborted_ = static_cast<int*>(flag);
  *aborted_ = 0;
  arguments_.aborted = aborted_;
}

/// Maps all mailboxes into this process; the obstacle, if there is one on any rank.
std::string PeerExchange::map(Communicator& bootstrap) {
  std::string handle;
  std::string obstacle = first_failure(run_together(bootstrap, [&] { handle = own_->handle(); }));
  if (!obstacle.empty()) {
    return obstacle;
  }
  const std::vector<std::string> handles = all_gather_strings(bootstrap, handle);
  obstacle = first_failure(run_together(bootstrap, [&] {
    for (int rank = 0; rank < bootstrap.size(); ++rank) {
      if (rank == bootstrap.rank()) {
        arguments_.mailboxes[rank] = own_->memory;
        continue;
      }
      cudaIpcMemHandle_t other;
      std::memcpy(other.reserved, handles[rank].data(), sizeof(other.reserved));
      void* memory = nullptr;
      const cudaError_t status =
          cudaIpcOpenMemHandle(&memory, other, cudaIpcMemLazyEnablePeerAccess);
      if (status != cudaSuccess) {
        static_cast<void>(cudaGetLastError());  // told here, and nobody else's
        throw std::runtime_error(
            c10::str("cannot map the memory of rank ", rank, ": ", cudaGetErrorString(status)));
      }
      arguments_.mailboxes[rank] = static_cast<std::byte*>(memory);
      mapped_.emplace_back(rank, arguments_.mailboxes[rank]);
    }
  }));
  return obstacle;
}

PeerExchange::~PeerExchange() {
  if (*aborted_ != 0) {
    // Other GPUs may still be writing, and kernels looking at the flag: all stays until the process
    // ends, as it is about to.
    static_cast<void>(new std::shared_ptr<Mailbox>(own_));
    return;
  }
  try {
    if (!mapped_by_all_) {
      own_->unmap(mapped_);  // nobody has exchanged rows
    } else {
      own_->goodbyes->leave();
      Retired::sweep(Retired{std::move(own_), std::move(mapped_)});
    }
    check_cuda(cudaFreeHost(aborted_), "cudaFreeHost");
  } catch (const std::runtime_error&) {
    // The GPU has failed: its next user will be told.
  }
}

void PeerExchange::all_to_all_v(const std::vector<Transfer>& transfers, cudaStream_t stream) {
  // In a graph the order is that of the stream that it is recorded from.
  const bool recorded = is_recorded(stream);
  if (!recorded) {
    check_cuda(cudaStreamWaitEvent(stream, last_), "cudaStreamWaitEvent");
  }
  const auto launch = [&] {
    peer::launch_exchange(arguments_, stream);
    arguments_.num_transfers = 0;
  };
  for (const Transfer& transfer : transfers) {
    const peer::Rows rows = rows_of(transfer);
    if (rows.row_bytes == 0) {
      continue;
    }
    arguments_.transfers[arguments_.num_transfers++] = rows;
    if (arguments_.num_transfers == peer::kMaxTransfers) {
      launch();
    }
  }
  if (arguments_.num_transfers > 0) {
    launch();
  }
  if (!recorded) {
    check_cuda(cudaEventRecord(last_, stream), "cudaEventRecord");
  }
}

void PeerExchange::abort() noexcept {
  std::atomic_ref<int>(*aborted_).store(1, std::memory_order_relaxed);
}

}  // namespace anabranch
