#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <anabranch/communicator.h>
#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

#include "communicator/agreement.h"
#include "communicator/chunks.h"
#include "communicator/nccl/bootstrap.h"
#include "communicator/nccl/watch.h"
#include "communicator/peer_memory/exchange.h"
#include "communicator/row_bytes.h"
#include "support/check.h"
#include "support/cuda_device.h"
#include "support/side_stream.h"

namespace anabranch {
namespace {

/// The way through peers' memory, where it is wanted and can be had. Collective.
std::unique_ptr<PeerExchange> tie_peers(Communicator& bootstrap,
                                        const CommunicatorOptions& options) {
  if (!options.peer_memory || !PeerExchange::suits(bootstrap)) {
    return nullptr;
  }
  std::string obstacle;
  auto peers = PeerExchange::make(bootstrap, obstacle);
  if (peers == nullptr && bootstrap.rank() == 0) {
    TORCH_WARN("rows go by NCCL, not through peers' memory: ", obstacle);
  }
  return peers;
}

/// NCCL over GPUs of all ranks, on the caller's current stream; `bootstrap` for host memory.
class NcclCommunicator final : public Communicator {
 public:
  NcclCommunicator(std::shared_ptr<Communicator> bootstrap, torch::Device device,
                   const CommunicatorOptions& options)
      : Communicator(bootstrap->rank(), bootstrap->size()),
        bootstrap_(std::move(bootstrap)),
        device_(device),
        options_(options),
        heartbeats_(*bootstrap_),
        group_(join_nccl_group(*bootstrap_, heartbeats_, options.deadline)),
        peers_(tie_peers(*bootstrap_, options)),
        watch_(*group_, heartbeats_, device.index(), options.deadline, [this] {
          if (peers_ != nullptr) {
            peers_->abort();
          }
        }) {
    connect();
  }

  ~NcclCommunicator() override {
    try {
      watch_.finish();
    } catch (const std::exception&) {
      // Whoever cares has been told by the call that failed.
    }
  }

  std::string name() const override { return "nccl"; }

  std::shared_ptr<Communicator> split(int color, int key) override {
    return make_nccl_communicator(bootstrap_->split(color, key), device_, options_);
  }

  void check() override { watch_.check(); }
  bool runs_on_stream() const override { return true; }
  bool gathers_rows() const override { return peers_ != nullptr; }

 protected:
  void do_all_to_all_v(const std::vector<Transfer>& transfers) override {
    if (!transfers.empty() && in_host_memory(transfers.front().send)) {
      bootstrap_->all_to_all_v(transfers);
      return;
    }
    const OnDevice stream(device_);
    if (peers_ != nullptr) {
      watch_.run("all_to_all_v", stream,
                 [&](ncclComm_t /*comm*/) { peers_->all_to_all_v(transfers, stream); });
      return;
    }
    SideStream beside(device_);
    watch_.run("all_to_all_v", stream, [&](ncclComm_t comm) {
      for (const Transfer& transfer : transfers) {
        exchange(transfer, comm, stream);
      }
    });
    // Launched behind NCCL's kernel, which then has the multiprocessors that it needs.
    beside.run([&] {
      for (const Transfer& transfer : transfers) {
        copy_own_rows(transfer);
      }
    });
  }

  /// Every rank sums one chunk in rank order, in fp32 for 16-bit types, and hands it to all.
  void do_all_reduce(torch::Tensor& tensor) override {
    if (in_host_memory(tensor)) {
      bootstrap_->all_reduce(tensor);
      return;
    }
    const OnDevice stream(device_);
    std::vector<int64_t> lengths;
    for (int peer = 0; peer < size(); ++peer) {
      lengths.push_back(chunk_length(tensor.numel(), peer, size()));
    }
    const int64_t own = lengths[rank()];
    torch::Tensor flat = tensor.view({-1});
    torch::Tensor parts = at::empty({size() * own}, tensor.options());
    const Transfer scatter{flat, lengths, parts, std::vector<int64_t>(size(), own)};
    copy_own_rows(scatter);
    watch_.run("all_reduce", stream, [&](ncclComm_t comm) { exchange(scatter, comm, stream); });
    const bool narrow = tensor.element_size() == 2 && tensor.is_floating_point();
    torch::Tensor sum = parts.narrow(0, 0, own).to(narrow ? torch::kFloat32 : tensor.scalar_type(),
                                                   /*non_blocking=*/false, /*copy=*/true);
    for (int peer = 1; peer < size(); ++peer) {
      sum.add_(parts.narrow(0, peer * own, own));
    }
    // The own chunk goes to every rank: as many equal parts to send as there are ranks.
    const torch::Tensor chunk = sum.to(tensor.scalar_type());
    flat.narrow(0, chunk_begin(tensor.numel(), rank(), size()), own).copy_(chunk);
    watch_.run("all_reduce", stream, [&](ncclComm_t comm) {
      for (int peer = 0; peer < size(); ++peer) {
        if (peer == rank()) {
          continue;
        }
        send(chunk.const_data_ptr(), own * tensor.element_size(), peer, comm, stream);
        receive(static_cast<char*>(flat.data_ptr()) +
                    chunk_begin(tensor.numel(), peer, size()) * tensor.element_size(),
                lengths[peer] * tensor.element_size(), peer, comm, stream);
      }
    });
  }

  void do_all_gather(const torch::Tensor& tensor, torch::Tensor& gathered) override {
    if (in_host_memory(tensor)) {
      gathered.copy_(bootstrap_->all_gather(tensor));
      return;
    }
    const OnDevice stream(device_);
    watch_.run("all_gather", stream, [&](ncclComm_t comm) {
      check_nccl(ncclAllGather(tensor.const_data_ptr(), gathered.data_ptr(), tensor.nbytes(),
                               ncclInt8, comm, stream),
                 "ncclAllGather");
    });
  }

  void do_broadcast(torch::Tensor& tensor, int root) override {
    if (in_host_memory(tensor)) {
      bootstrap_->broadcast(tensor, root);
      return;
    }
    const OnDevice stream(device_);
    watch_.run("broadcast", stream, [&](ncclComm_t comm) {
      check_nccl(ncclBroadcast(tensor.data_ptr(), tensor.data_ptr(), tensor.nbytes(), ncclInt8,
                               root, comm, stream),
                 "ncclBroadcast");
    });
  }

  void do_barrier() override {
    const OnDevice stream(device_);
    torch::Tensor token = at::zeros({1}, at::TensorOptions(device_).dtype(torch::kByte));
    watch_.run("barrier", stream, [&](ncclComm_t comm) {
      check_nccl(
          ncclAllReduce(token.data_ptr(), token.data_ptr(), 1, ncclInt8, ncclSum, comm, stream),
          "ncclAllReduce");
    });
    check_cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
    check();
  }

  void check_device(torch::Device device) const override {
    check_input(device == device_ || device.is_cpu(), "nccl: tensor on ", device, ", expected ",
                device_, " or host memory");
  }

 private:
  /// A byte from every rank to every other. A launch whose ranks are not connected yet waits for them
  /// on the host, where no more can be done about one that has died than to abort NCCL in the midst of
  /// it: so all launches that do are here, where every rank has just been heard of.
  void connect() {
    const OnDevice stream(device_);
    const std::vector<int64_t> ones(size(), 1);
    const auto bytes = at::zeros({2, size()}, at::TensorOptions(device_).dtype(torch::kByte));
    const Transfer transfer{bytes[0], ones, bytes[1], ones};
    watch_.run("connection", stream, [&](ncclComm_t comm) { exchange(transfer, comm, stream); });
  }

  /// The ranks' host memories do not know of a failure on the GPUs' way.
  bool in_host_memory(const torch::Tensor& tensor) {
    if (tensor.is_cpu()) {
      check();
    }
    return tensor.is_cpu();
  }

  static void send(const void* data, size_t bytes, int peer, ncclComm_t comm, cudaStream_t stream) {
    if (bytes > 0) {
      check_nccl(ncclSend(data, bytes, ncclInt8, peer, comm, stream), "ncclSend");
    }
  }
  static void receive(void* data, size_t bytes, int peer, ncclComm_t comm, cudaStream_t stream) {
    if (bytes > 0) {
      check_nccl(ncclRecv(data, bytes, ncclInt8, peer, comm, stream), "ncclRecv");
    }
  }

  /// The rows for and from other ranks; peers with none are left out on both sides.
  void exchange(const Transfer& transfer, ncclComm_t comm, cudaStream_t stream) const {
    const auto bytes = static_cast<size_t>(row_bytes(transfer.send));
    const auto* source = static_cast<const char*>(transfer.send.const_data_ptr());
    auto* target = static_cast<char*>(transfer.receive.data_ptr());
    for (int peer = 0; peer < size(); ++peer) {
      const size_t outgoing = static_cast<size_t>(transfer.send_rows[peer]) * bytes;
      const size_t incoming = static_cast<size_t>(transfer.receive_rows[peer]) * bytes;
      if (peer != rank()) {
        send(source, outgoing, peer, comm, stream);
        receive(target, incoming, peer, comm, stream);
      }
      source += outgoing;
      target += incoming;
    }
  }

  void copy_own_rows(const Transfer& transfer) const {
    const auto bytes = static_cast<size_t>(row_bytes(transfer.send));
    size_t from = 0;
    size_t to = 0;
    for (int peer = 0; peer < rank(); ++peer) {
      from += static_cast<size_t>(transfer.send_rows[peer]) * bytes;
      to += static_cast<size_t>(transfer.receive_rows[peer]) * bytes;
    }
    const size_t own = static_cast<size_t>(transfer.send_rows[rank()]) * bytes;
    if (own > 0) {
      check_cuda(cudaMemcpyAsync(static_cast<char*>(transfer.receive.data_ptr()) + to,
                                 static_cast<const char*>(transfer.send.const_data_ptr()) + from,
                                 own, cudaMemcpyDeviceToDevice,
                                 c10::cuda::getCurrentCUDAStream(device_.index())),
                 "cudaMemcpyAsync");
    }
  }

  std::shared_ptr<Communicator> bootstrap_;
  torch::Device device_;
  CommunicatorOptions options_;
  NcclHeartbeats heartbeats_;
  std::unique_ptr<NcclGroup> group_;
  std::unique_ptr<PeerExchange> peers_;  ///< null: rows go by NCCL
  NcclWatch watch_;
};

}  // namespace

std::shared_ptr<Communicator> make_nccl_communicator(std::shared_ptr<Communicator> bootstrap,
                                                     torch::Device device,
                                                     const CommunicatorOptions& options) {
  check_input(bootstrap != nullptr, "make_nccl_communicator: no bootstrap communicator");
  check_input(device.is_cuda(), "make_nccl_communicator: ", device, " is not a GPU");
  check_input(options.deadline.count() > 0, "make_nccl_communicator: the deadline is ",
              options.deadline.count(), " ms, expected more than 0");
  succeed_together(*bootstrap, [&] {
    const auto index = device.has_index() ? device.index() : c10::cuda::current_device();
    if (index >= c10::cuda::device_count()) {
      throw std::runtime_error(c10::str("there is no ", device, ", only ",
                                        static_cast<int>(c10::cuda::device_count()), " GPUs"));
    }
    device = torch::Device(torch::kCUDA, index);
  });
  const c10::cuda::CUDAGuard guard(device);
  return std::make_shared<NcclCommunicator>(std::move(bootstrap), device, options);
}

std::shared_ptr<Communicator> make_nccl_communicator(const std::string& unique_id, int rank,
                                                     int size, torch::Device device,
                                                     const CommunicatorOptions& options) {
  check_input(device.is_cuda(), "make_nccl_communicator: ", device, " is not a GPU");
  check_input(size >= 1 && rank >= 0 && rank < size, "make_nccl_communicator: rank ", rank, " of ",
              size);
  return make_nccl_communicator(meet_through_nccl(unique_id, rank, size, device, options), device,
                                options);
}

}  // namespace anabranch
