#include "communicator/nccl/bootstrap.h"

#include <ATen/ops/zeros.h>
#include <anabranch/error.h>
#include <c10/util/StringUtil.h>

#include <cstring>
#include <sstream>
#include <thread>

#include "communicator/agreement.h"
#include "communicator/describe.h"
#include "communicator/host.h"
#include "communicator/nccl/address.h"
#include "communicator/nccl/watch.h"
#include "communicator/store/store.h"
#include "communicator/waiting_time.h"
#include "support/check.h"
#include "support/cuda/device.h"

namespace anabranch {
namespace {

constexpr std::chrono::milliseconds kPause{2};
constexpr int64_t kAddressBytes = 512;

ncclUniqueId id_of(const std::string& bytes) {
  ncclUniqueId id;
  check_input(bytes.size() == sizeof(id), "NCCL's id is ", bytes.size(), " bytes, expected ",
              sizeof(id));
  std::memcpy(&id, bytes.data(), sizeof(id));
  return id;
}

/// Says that this rank lives, and ends when another has failed or has not come in time.
class Joining {
 public:
  Joining(NcclHeartbeats& heartbeats, std::chrono::milliseconds deadline)
      : heartbeats_(heartbeats),
        deadline_(deadline),
        heartbeat_(NcclWatch::heartbeat_for(deadline)) {}

  void keep_waiting() {
    std::this_thread::sleep_for(kPause);
    const auto now = Clock::now();
    if (now >= next_sign_) {
      heartbeats_.publish(0, 0);
      next_sign_ = now + heartbeat_;
    }
    heartbeats_.listen();
    if (const auto& failure = heartbeats_.announced()) {
      throw CommunicationError(failure->text, failure->culprits);
    }
    if (waiting_.so_far() > deadline_) {
      const std::vector<int> missing = heartbeats_.missing(0, 0, heartbeat_);
      fail(c10::str("NCCL's initialisation did not end within ", in_seconds(deadline_),
                    blame(missing, heartbeats_)),
           missing);
    }
  }

  [[noreturn]] void fail(const std::string& reason, const std::vector<int>& culprits) {
    const std::string text = c10::str("rank ", heartbeats_.rank(), ": ", reason);
    heartbeats_.announce({text, culprits});
    throw CommunicationError(text, culprits);
  }

 private:
  using Clock = std::chrono::steady_clock;
  NcclHeartbeats& heartbeats_;
  std::chrono::milliseconds deadline_;
  std::chrono::milliseconds heartbeat_;
  WaitingTime waiting_;
  Clock::time_point next_sign_ = Clock::now();
};

/// Waits for the stream, but not for good.
void wait_for(cudaStream_t stream, const NcclGroup::KeepWaiting& keep_waiting) {
  cudaError_t state = cudaErrorNotReady;
  while ((state = cudaStreamQuery(stream)) == cudaErrorNotReady) {
    keep_waiting();
  }
  check_cuda(state, "cudaStreamQuery");
}

}  // namespace

int loaded_nccl_version() {
  int version = 0;
  check_nccl(ncclGetVersion(&version), "ncclGetVersion");
  if (version < NCCL_VERSION(2, 19, 0)) {
    throw std::runtime_error("NCCL " + nccl_version_name(version) +
                             " is loaded, 2.19 or newer is needed");
  }
  return version;
}

std::string nccl_version_name(int version) {
  return c10::str(version / 10000, '.', version / 100 % 100, '.', version % 100);
}

std::string describe_nccl() {
  // Several ranks on one GPU, as the tests have them, need 2.30.3.
  const int version = loaded_nccl_version();
  return c10::str("NCCL ", nccl_version_name(version), " (built with ",
                  nccl_version_name(NCCL_VERSION_CODE), "): abort",
                  version >= NCCL_VERSION(2, 30, 3)
                      ? ", several ranks on one GPU (NCCL_MULTI_RANK_GPU_ENABLE=1)"
                      : "; a GPU for each rank");
}

std::string make_nccl_unique_id() {
  ncclUniqueId id;
  check_nccl(ncclGetUniqueId(&id), "ncclGetUniqueId");
  return {id.internal, sizeof(id.internal)};
}

std::unique_ptr<NcclGroup> join_nccl_group(Communicator& bootstrap, NcclHeartbeats& heartbeats,
                                           std::chrono::milliseconds deadline) {
  std::string id;
  succeed_together(bootstrap, [&] {
    loaded_nccl_version();
    if (bootstrap.rank() == 0) {
      id = make_nccl_unique_id();
    }
  });
  id = all_gather_strings(bootstrap, id)[0];
  Joining joining(heartbeats, deadline);
  try {
    return std::make_unique<NcclGroup>(
        id_of(id), bootstrap.rank(), bootstrap.size(), [&] { joining.keep_waiting(); },
        NcclGroup::Waiting::kBlocks);
  } catch (const CommunicationError&) {
    throw;
  } catch (const std::exception& error) {
    joining.fail(error.what(), {bootstrap.rank()});
  }
}

std::shared_ptr<Communicator> meet_through_nccl(const std::string& unique_id, int rank, int size,
                                                torch::Device device,
                                                const CommunicatorOptions& options) {
  WaitingTime waiting;
  const NcclGroup::KeepWaiting keep_waiting = [&] {
    std::this_thread::sleep_for(kPause);
    if (waiting.so_far() > options.deadline) {
      throw CommunicationError(
          c10::str("rank ", rank, ": not all of the ", size,
                   " ranks with this id of NCCL's came within ", in_seconds(options.deadline)),
          {});
    }
  };
  const OnDevice stream(device);
  NcclGroup group(id_of(unique_id), rank, size, keep_waiting, NcclGroup::Waiting::kCallsBack);

  const std::string loopback = loopback_address(network_interfaces());
  int port = 0;
  c10::intrusive_ptr<c10d::Store> store;
  torch::Tensor address = at::zeros({kAddressBytes}, at::kByte);
  if (rank == 0) {
    store = open_tcp_store(loopback, port, /*serves=*/true, options.deadline);
    auto host = own_address(/*ipv6=*/false);
    host = host.has_value() ? host : own_address(/*ipv6=*/true);
    const std::string text = c10::str(network_identity(), ' ', host.value_or(loopback), ' ', port);
    text.copy(static_cast<char*>(address.mutable_data_ptr()), text.size());
  }
  torch::Tensor shared = address.to(device);
  group.launch([&](ncclComm_t comm) {
    check_nccl(ncclBroadcast(shared.data_ptr(), shared.data_ptr(), kAddressBytes, ncclInt8,
                             /*root=*/0, comm, stream),
               "ncclBroadcast");
  });
  wait_for(stream, keep_waiting);
  if (rank != 0) {
    address = shared.cpu();
    std::string network;
    std::string host;
    std::istringstream(static_cast<const char*>(address.const_data_ptr())) >> network >> host >>
        port;
    store = open_tcp_store(network == network_identity() ? loopback : host, port,
                           /*serves=*/false, options.deadline);
  }
  group.finalize();
  return make_store_communicator(std::move(store), rank, size, options);
}

}  // namespace anabranch
