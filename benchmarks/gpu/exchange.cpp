// Dispatch and combine, by NCCL and by peers' memory, beside bare grouped ncclSend and ncclRecv of the
// same bytes, in the same run:
//   mpirun -n 8 benchmark_gpu_exchange --json FILE
// Each rank takes a GPU of its host; several on one need NCCL 2.30.3, NCCL_MULTI_RANK_GPU_ENABLE=1
// and NCCL_NVLS_ENABLE=0, and tell about the code's overhead, not about a network.
#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/topk.h>
#include <ATen/ops/zeros.h>
#include <anabranch/build.h>
#include <anabranch/exchange.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <chrono>
#include <cstdio>
#include <cstring>
#include <iostream>

#include "communicator/nccl/group.h"
#include "communicator/nccl/nccl.h"
#include "gpu/measure.h"
#include "support/cuda/check.h"

namespace anabranch::benchmark {
namespace {

/// NCCL alone: blocking calls, no watch, no checks.
class BareNccl {
 public:
  explicit BareNccl(Communicator& host) : rank_(host.rank()), size_(host.size()) {
    auto bytes = at::zeros({NCCL_UNIQUE_ID_BYTES}, at::kByte);
    ncclUniqueId id;
    if (rank_ == 0) {
      check_nccl(ncclGetUniqueId(&id), "ncclGetUniqueId");
      std::memcpy(bytes.mutable_data_ptr(), &id, sizeof(id));
    }
    host.broadcast(bytes, 0);
    std::memcpy(&id, bytes.const_data_ptr(), sizeof(id));
    check_nccl(ncclCommInitRank(&comm_, size_, id, rank_), "ncclCommInitRank");
  }
  ~BareNccl() { static_cast<void>(ncclCommDestroy(comm_)); }
  BareNccl(const BareNccl&) = delete;
  BareNccl& operator=(const BareNccl&) = delete;

  /// Rows for other ranks only.
  void exchange(const Transfer& transfer) const {
    const auto row = static_cast<size_t>(transfer.send.size(1) * transfer.send.element_size());
    const auto* source = static_cast<const char*>(transfer.send.const_data_ptr());
    auto* target = static_cast<char*>(transfer.receive.data_ptr());
    const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
    check_nccl(ncclGroupStart(), "ncclGroupStart");
    for (int peer = 0; peer < size_; ++peer) {
      const size_t out = static_cast<size_t>(transfer.send_rows[peer]) * row;
      const size_t in = static_cast<size_t>(transfer.receive_rows[peer]) * row;
      if (peer != rank_) {
        check_nccl(ncclSend(source, out, ncclInt8, peer, comm_, stream), "ncclSend");
        check_nccl(ncclRecv(target, in, ncclInt8, peer, comm_, stream), "ncclRecv");
      }
      source += out;
      target += in;
    }
    check_nccl(ncclGroupEnd(), "ncclGroupEnd");
  }

 private:
  int rank_;
  int size_;
  ncclComm_t comm_ = nullptr;
};

/// Largest of all ranks' values.
double largest(Communicator& host, double value) {
  return host.all_gather(at::empty({}, at::kDouble).fill_(value)).max().item<double>();
}

/// Milliseconds of each call, of the slowest rank: medians of rounds of as many calls on every rank.
std::vector<double> milliseconds(Communicator& host,
                                 const std::vector<std::function<void()>>& calls) {
  constexpr int kRounds = 9;
  constexpr int kCalls = 10;
  return medians_in_turn(calls.size(), kRounds, [&](size_t i) {
    check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    host.barrier();
    return largest(host, batch_milliseconds(calls[i], kCalls));
  });
}

constexpr std::chrono::minutes kDeadline(1);

struct Case {
  int64_t tokens, hidden, experts, top_k;
};

class Bench {
 public:
  Bench(std::shared_ptr<Communicator> host, torch::Device device)
      : host_(std::move(host)),
        nccl_(make_nccl_communicator(host_, device, {kDeadline, /*peer_memory=*/false})),
        peers_(make_nccl_communicator(host_, device, {kDeadline, /*peer_memory=*/true})),
        bare_(*host_),
        options_(at::TensorOptions(device).dtype(at::kBFloat16)) {}

  void run(const Case& shape) {
    const Exchange by_nccl(nccl_, shape.experts);
    const Exchange by_peers(peers_, shape.experts);
    Routing routing;
    const auto scores = at::rand({shape.tokens, shape.experts}, options_.dtype(at::kFloat));
    routing.expert_ids = std::get<1>(scores.topk(shape.top_k, 1));
    routing.weights = at::ones({shape.tokens, shape.top_k}, options_.dtype(at::kFloat));
    const ExchangePlan plan = by_nccl.plan(routing);
    const auto x = at::randn({shape.tokens, shape.hidden}, options_);
    const auto sent = at::randn({plan.send_tokens.size(0), shape.hidden}, options_);
    const auto received = at::randn({plan.rows(), shape.hidden}, options_);
    const Transfer there{sent, plan.send_rows, received, plan.receive_rows};
    const Transfer back{received, plan.receive_rows, sent, plan.send_rows};
    nccl_->reset_traffic();
    nccl_->all_to_all_v({there});
    const auto bytes = largest(*host_, static_cast<double>(nccl_->traffic().bytes_sent));

    std::vector<std::function<void()>> calls = {[&] { bare_.exchange(there); },
                                                [&] { bare_.exchange(back); }};
    for (const Exchange* exchange : {&by_nccl, &by_peers}) {
      calls.emplace_back([&, exchange] { exchange->communicator().all_to_all_v({there}); });
      calls.emplace_back([&, exchange] { exchange->dispatch({x, {}}, plan); });
      calls.emplace_back([&, exchange] { exchange->combine({received, {}}, plan); });
    }
    const auto times = milliseconds(*host_, calls);
    report(shape, "nccl", bytes, {times[0], times[1], times[2], times[3], times[4]});
    // Where GPUs cannot map each other's memory, it would be NCCL once more.
    if (uses_peer_memory(*peers_)) {
      report(shape, "peer memory", bytes, {times[0], times[1], times[5], times[6], times[7]});
    }
  }

  Json results = Json::array();

 private:
  struct Times {
    double bare, bare_back, all_to_all, dispatch, combine;  ///< ms
  };

  void report(const Case& shape, const std::string& way, double bytes, const Times& times) {
    results.push_back(Json{{"way", way},
                           {"ranks", int64_t{host_->size()}},
                           {"gpus", static_cast<int64_t>(at::getNumGPUs())},
                           {"tokens", shape.tokens},
                           {"hidden", shape.hidden},
                           {"experts", shape.experts},
                           {"top_k", shape.top_k},
                           {"bytes", static_cast<int64_t>(bytes)},
                           {"bare_ms", times.bare},
                           {"all_to_all_ms", times.all_to_all},
                           {"dispatch_ms", times.dispatch},
                           {"bare_back_ms", times.bare_back},
                           {"combine_ms", times.combine}});
    if (host_->rank() == 0) {
      std::printf(
          "W %d T %6ld h %5ld E %3ld k %ld %-11s: %7.1f MB, bare %8.3f ms %6.1f GB/s; all_to_all_v "
          "%8.3f (%.2f) dispatch %8.3f (%.2f) combine %8.3f (%.2f)\n",
          host_->size(), long{shape.tokens}, long{shape.hidden}, long{shape.experts},
          long{shape.top_k}, way.c_str(), bytes / 1e6, times.bare, bytes / times.bare / 1e6,
          times.all_to_all, times.bare / times.all_to_all, times.dispatch,
          times.bare / times.dispatch, times.combine, times.bare_back / times.combine);
      std::fflush(stdout);
    }
  }

  std::shared_ptr<Communicator> host_;
  std::shared_ptr<Communicator> nccl_;
  std::shared_ptr<Communicator> peers_;
  BareNccl bare_;
  at::TensorOptions options_;
};

void run(const Arguments& arguments) {
  const auto host = make_mpi_communicator();
  const auto gpus = static_cast<int>(at::getNumGPUs());
  const torch::Device device(torch::kCUDA, static_cast<c10::DeviceIndex>(host->rank() % gpus));
  const c10::cuda::CUDAGuard guard(device);
  if (host->size() == 1) {
    throw std::invalid_argument("one rank has nobody to exchange with: mpirun -n 2 or more");
  }
  Bench bench(host, device);
  for (const Case& shape : {Case{1024, 2048, 64, 8}, Case{16384, 2048, 64, 8},
                            Case{16384, 4096, 8, 2}, Case{8192, 7168, 256, 8}}) {
    bench.run(shape);
    if (arguments.quick) {
      break;
    }
  }
  if (host->rank() == 0) {
    std::cout << describe_build();
    write_gpu_results(arguments, bench.results);
  }
  host->barrier();
}

}  // namespace
}  // namespace anabranch::benchmark

int main(int argc, char** argv) {
  using namespace anabranch::benchmark;
  return run_benchmark(argc, argv,
                       {"Dispatch and combine between GPUs beside bare ncclSend and ncclRecv, bf16",
                        {"json", "commit", "quick"}},
                       run);
}
