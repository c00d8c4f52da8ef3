#include "communicator/nccl/nccl.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

#include "communicator/agreement.h"
#include "communicator/done.h"
#include "communicator/errors.h"
#include "communicator/hierarchical/node_layout.h"
#include "communicator/host.h"
#include "communicator/nccl/bootstrap.h"
#include "communicator/nccl/watch.h"
#include "communicator/peer_memory/exchange.h"
#include "communicator/sum.h"
#include "communicator/transfer_rows.h"
#include "support/check.h"
#include "support/cuda/device.h"
#include "support/cuda/stream.h"

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
                   const CommunicatorOptions& options, NcclFamily family)
      : Communicator(bootstrap->rank(), bootstrap->size()),
        bootstrap_(std::move(bootstrap)),
        device_(device),
        options_(options),
        layout_(all_gather_strings(*bootstrap_, host_identity())),
        heartbeats_(*bootstrap_),
        family_(std::move(family)),
        group_(join_nccl_group(*bootstrap_, heartbeats_, options.deadline)),
        peers_(tie_peers(*bootstrap_, options)),
        watch_(*group_, heartbeats_, family_, device.index(), options.deadline, [this] {
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

  void check() override { watch_.check(); }
  bool reads_counts_on(torch::Device device) const override {
    return device.is_cpu() || peers_ != nullptr;
  }
  SplitOrder split_order(torch::Device device) const override {
    return device.is_cpu() ? SplitOrder::kAny : SplitOrder::kBestOne;
  }
  bool uses_peer_memory() const { return peers_ != nullptr; }

 protected:
  std::unique_ptr<Pending> start(Collective call, Messages messages) override {
    if (messages.device.is_cpu()) {
      check();  // the ranks' host memories do not know of a failure on the GPUs' way
      return start_by(*bootstrap_, call, std::move(messages));
    }
    launch(name_of(call), [&](ncclComm_t comm, cudaStream_t stream) {
      for (const Message& message : messages.outgoing) {
        check_nccl(ncclSend(message.source(), message.bytes, ncclInt8, message.peer, comm, stream),
                   "ncclSend");
      }
      for (const Message& message : messages.incoming) {
        check_nccl(ncclRecv(message.target(), message.bytes, ncclInt8, message.peer, comm, stream),
                   "ncclRecv");
      }
    });
    return std::make_unique<Done>();
  }

  std::shared_ptr<Communicator> regroup(const std::vector<int>& members, int rank) override {
    const c10::cuda::CUDAGuard guard(device_);
    return std::make_shared<NcclCommunicator>(regroup_by(*bootstrap_, members, rank), device_,
                                              options_, family_.split(members));
  }

  std::unique_ptr<Pending> do_all_to_all_v(std::vector<Transfer> transfers) override {
    if (peers_ == nullptr || transfers.empty() || transfers.front().send.is_cpu()) {
      return Communicator::do_all_to_all_v(std::move(transfers));
    }
    move_by_peers("all_to_all_v", transfers);
    return std::make_unique<Done>();
  }

  /// Not by ncclAllReduce, which in a switch of NVLink's may give other bits in another run.
  void do_all_reduce(torch::Tensor& tensor) override {
    if (peers_ != nullptr && tensor.is_cuda() && is_summed_at_once(tensor)) {
      sum_all_terms(tensor);
      return;
    }
    sum_in_levels(tensor, rank(), layout_.levels_of_sum(rank(), tensor.nbytes()),
                  [&](const Messages& messages) {
                    start_by(*this, Collective::kAllReduce, messages)->finish();
                  });
  }

  void do_all_gather(const torch::Tensor& tensor, torch::Tensor& gathered) override {
    if (tensor.is_cpu()) {
      Communicator::do_all_gather(tensor, gathered);
      return;
    }
    launch("all_gather", [&](ncclComm_t comm, cudaStream_t stream) {
      check_nccl(ncclAllGather(tensor.const_data_ptr(), gathered.data_ptr(), tensor.nbytes(),
                               ncclInt8, comm, stream),
                 "ncclAllGather");
    });
    const auto others = static_cast<int64_t>(gathered.nbytes() - tensor.nbytes());
    count(others, others);
  }

  void do_broadcast(torch::Tensor& tensor, int root) override {
    if (tensor.is_cpu()) {
      Communicator::do_broadcast(tensor, root);
      return;
    }
    launch("broadcast", [&](ncclComm_t comm, cudaStream_t stream) {
      check_nccl(ncclBroadcast(tensor.data_ptr(), tensor.data_ptr(), tensor.nbytes(), ncclInt8,
                               root, comm, stream),
                 "ncclBroadcast");
    });
    const auto bytes = static_cast<int64_t>(tensor.nbytes());
    count(rank() == root ? (size() - 1) * bytes : 0, rank() == root ? 0 : bytes);
  }

  void do_barrier() override {
    torch::Tensor token = at::zeros({1}, at::TensorOptions(device_).dtype(torch::kByte));
    launch("barrier", [&](ncclComm_t comm, cudaStream_t stream) {
      check_nccl(
          ncclAllReduce(token.data_ptr(), token.data_ptr(), 1, ncclInt8, ncclSum, comm, stream),
          "ncclAllReduce");
    });
    wait_for_stream(device_);
    count(size() - 1, size() - 1);
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
    to_all_ = at::zeros({size()}, at::TensorOptions(device_).dtype(torch::kLong));
    wait_for_stream(device_);  // whatever stream it is read on
    const auto bytes = at::zeros({2, size()}, at::TensorOptions(device_).dtype(torch::kByte));
    launch("connection", [&](ncclComm_t comm, cudaStream_t stream) {
      for (int peer = 0; peer < size(); ++peer) {
        if (peer != rank()) {
          check_nccl(ncclSend(bytes[0][peer].data_ptr(), 1, ncclInt8, peer, comm, stream),
                     "ncclSend");
          check_nccl(ncclRecv(bytes[1][peer].data_ptr(), 1, ncclInt8, peer, comm, stream),
                     "ncclRecv");
        }
      }
    });
  }

  void move_by_peers(const char* name, const std::vector<Transfer>& transfers) {
    const OnDevice stream(device_);
    watch_.run(name, stream, [&](ncclComm_t /*comm*/) { peers_->all_to_all_v(transfers, stream); });
    for (const Transfer& transfer : transfers) {
      if (transfer.counts.defined()) continue;  // the host knows none
      const auto elsewhere = [&](const std::vector<int64_t>& rows) {
        return row_offsets(rows).back() - rows[rank()];
      };
      const int64_t bytes = row_bytes(transfer.send);
      count(elsewhere(transfer.send_rows) * bytes, elsewhere(transfer.receive_rows) * bytes);
    }
  }

  /// Whether the launches of a sum take longer than its bytes, and its terms are as wide as what they add to.
  static bool is_summed_at_once(const torch::Tensor& tensor) {
    constexpr int64_t kSmall = 64 << 10;
    return tensor.numel() > 0 && static_cast<int64_t>(tensor.nbytes()) <= kSmall &&
           at::toOpMathType(tensor.scalar_type()) == tensor.scalar_type();
  }

  /// Every rank sends all of its terms to all others, and adds them in rank order.
  void sum_all_terms(torch::Tensor& tensor) {
    const auto terms = at::empty({size(), tensor.numel()}, tensor.options());
    const std::vector<int64_t> once(size(), 1);
    move_by_peers("all_reduce", {{tensor.view({1, -1}), once, terms, once, to_all_}});
    auto total = tensor.view({-1});
    at::add_out(total, terms[0], terms[1]);
    for (int rank = 2; rank < size(); ++rank) {
      total.add_(terms[rank]);
    }
  }

  /// One collective on the current stream, in the watch's sight.
  void launch(const char* name, const std::function<void(ncclComm_t, cudaStream_t)>& calls) {
    const OnDevice stream(device_);
    watch_.run(name, stream, [&](ncclComm_t comm) { calls(comm, stream); });
  }

  std::shared_ptr<Communicator> bootstrap_;
  torch::Device device_;
  CommunicatorOptions options_;
  NodeLayout layout_;
  NcclHeartbeats heartbeats_;
  NcclFamily family_;
  std::unique_ptr<NcclGroup> group_;
  std::unique_ptr<PeerExchange> peers_;  ///< null: rows go by NCCL
  torch::Tensor to_all_;                 ///< [size] zeros: one row for every rank
  NcclWatch watch_;
};

}  // namespace

bool uses_peer_memory(const Communicator& communicator) {
  const auto* nccl = dynamic_cast<const NcclCommunicator*>(&communicator);
  return nccl != nullptr && nccl->uses_peer_memory();
}

std::shared_ptr<Communicator> make_nccl_communicator(std::shared_ptr<Communicator> bootstrap,
                                                     torch::Device device,
                                                     const CommunicatorOptions& options) {
  check_input(bootstrap != nullptr, "make_nccl_communicator: no bootstrap communicator");
  check_input(device.is_cuda(), "make_nccl_communicator: ", device, " is not a GPU");
  check_options("make_nccl_communicator", options);
  succeed_together(*bootstrap, [&] {
    const auto index = device.has_index() ? device.index() : c10::cuda::current_device();
    if (index >= c10::cuda::device_count()) {
      throw std::runtime_error(c10::str("there is no ", device, ", only ",
                                        static_cast<int>(c10::cuda::device_count()), " GPUs"));
    }
    device = torch::Device(torch::kCUDA, index);
  });
  const c10::cuda::CUDAGuard guard(device);
  const NcclFamily family(bootstrap->size());
  return std::make_shared<NcclCommunicator>(std::move(bootstrap), device, options, family);
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
