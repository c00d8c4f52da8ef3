#include "communicator/store/store.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <anabranch/error.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <cstring>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>
#include <tuple>
#include <utility>

#include "communicator/waiting_time.h"
#include "support/check.h"

namespace anabranch {
namespace {

/// The store refuses values of more than 8 MiB.
constexpr int64_t kPieceBytes = int64_t{4} << 20;
/// How long rank 0 keeps the store for ranks that have not read their last message yet.
constexpr std::chrono::milliseconds kLongestFarewell{10'000};

/// A store shared by a group and all groups split from it. The rank that serves it leaves last.
class Meeting {
 public:
  Meeting(c10::intrusive_ptr<c10d::Store> store, int rank, int size)
      : store_(std::move(store)), rank_(rank), size_(size) {}
  ~Meeting() {
    try {
      store_->set(left(rank_), std::vector<uint8_t>());
      for (int peer = 1; rank_ == 0 && peer < size_; ++peer) {
        store_->wait({left(peer)}, kLongestFarewell);
      }
    } catch (const std::exception&) {
      // A rank that died leaves no word.
    }
  }
  Meeting(const Meeting&) = delete;
  Meeting& operator=(const Meeting&) = delete;

  c10d::Store& store() { return *store_; }

 private:
  static std::string left(int rank) { return c10::str("left/", rank); }

  c10::intrusive_ptr<c10d::Store> store_;
  int rank_;
  int size_;
};

/// Messages between host memories, each a key of the store that its receiver deletes.
class StoreCommunicator final : public Communicator {
 public:
  StoreCommunicator(std::shared_ptr<Meeting> meeting, std::string group, int rank, int size,
                    CommunicatorOptions options)
      : Communicator(rank, size),
        meeting_(std::move(meeting)),
        group_(std::move(group)),
        options_(options) {}

  std::string name() const override { return "store"; }
  std::shared_ptr<Communicator> split(int color, int key) override;

 protected:
  void do_all_to_all_v(const std::vector<Transfer>& transfers) override;
  void do_all_reduce(torch::Tensor& tensor) override;
  void do_all_gather(const torch::Tensor& tensor, torch::Tensor& gathered) override;
  void do_broadcast(torch::Tensor& tensor, int root) override;
  void do_barrier() override;
  void check_device(torch::Device device) const override {
    check_input(device.is_cpu(), "the store communicator moves tensors in host memory, not on ",
                device);
  }

 private:
  std::string key(int from, int to, int64_t offset) const {
    return c10::str(group_, '/', calls_, '/', from, '/', to, '/', offset);
  }
  void gather(const torch::Tensor& tensor, const torch::Tensor& gathered, const char* call);
  void send(const at::Tensor& rows, int peer, const char* call);
  void receive(const at::Tensor& rows, int peer, const char* call);
  [[noreturn]] void fail(const char* call, int peer, const std::exception& error);

  std::shared_ptr<Meeting> meeting_;
  std::string group_;
  CommunicatorOptions options_;
  int64_t calls_ = 0;
};

void StoreCommunicator::send(const at::Tensor& rows, int peer, const char* call) {
  const auto* data = static_cast<const uint8_t*>(rows.const_data_ptr());
  const auto bytes = static_cast<int64_t>(rows.nbytes());
  try {
    for (int64_t begin = 0; begin < bytes; begin += kPieceBytes) {
      const int64_t end = std::min(begin + kPieceBytes, bytes);
      meeting_->store().set(key(rank(), peer, begin),
                            std::vector<uint8_t>(data + begin, data + end));
    }
  } catch (const std::exception& error) {
    fail(call, 0, error);
  }
}

void StoreCommunicator::receive(const at::Tensor& rows, int peer, const char* call) {
  auto* data = static_cast<uint8_t*>(rows.mutable_data_ptr());
  const auto bytes = static_cast<int64_t>(rows.nbytes());
  try {
    for (int64_t begin = 0; begin < bytes; begin += kPieceBytes) {
      const std::string piece = key(peer, rank(), begin);
      meeting_->store().wait({piece}, options_.deadline);
      const std::vector<uint8_t> value = meeting_->store().get(piece);
      meeting_->store().deleteKey(piece);
      const auto expected = static_cast<size_t>(std::min(kPieceBytes, bytes - begin));
      check_input(value.size() == expected, value.size(), " bytes came where ", expected,
                  " were expected: the ranks' arguments do not fit");
      std::memcpy(data + begin, value.data(), expected);
    }
  } catch (const std::exception& error) {
    fail(call, peer, error);
  }
}

void StoreCommunicator::fail(const char* call, int peer, const std::exception& error) {
  throw CommunicationError(
      c10::str("rank ", rank(), ": ", call, " waited up to ", in_seconds(options_.deadline),
               " for rank ", peer, " (dead, stalled, or not making the call): ", error.what()),
      {peer});
}

void StoreCommunicator::do_all_to_all_v(const std::vector<Transfer>& transfers) {
  for (const Transfer& transfer : transfers) {
    ++calls_;
    const auto outgoing = transfer.send.split_with_sizes(transfer.send_rows);
    const auto incoming = transfer.receive.split_with_sizes(transfer.receive_rows);
    incoming[rank()].copy_(outgoing[rank()]);
    for (int i = 1; i < size(); ++i) {
      const int peer = (rank() + i) % size();
      send(outgoing[peer], peer, "all_to_all_v");
    }
    for (int i = 1; i < size(); ++i) {
      const int peer = (rank() + i) % size();
      receive(incoming[peer], peer, "all_to_all_v");
    }
  }
}

void StoreCommunicator::do_all_gather(const torch::Tensor& tensor, torch::Tensor& gathered) {
  gather(tensor, gathered, "all_gather");
}

void StoreCommunicator::gather(const torch::Tensor& tensor, const torch::Tensor& gathered,
                               const char* call) {
  ++calls_;
  for (int peer = 0; peer < size(); ++peer) {
    if (peer != rank()) {
      send(tensor, peer, call);
    }
  }
  for (int peer = 0; peer < size(); ++peer) {
    if (peer == rank()) {
      gathered[peer].copy_(tensor);
    } else {
      receive(gathered[peer], peer, call);
    }
  }
}

void StoreCommunicator::do_all_reduce(torch::Tensor& tensor) {
  std::vector<int64_t> sizes = tensor.sizes().vec();
  sizes.insert(sizes.begin(), size());
  torch::Tensor terms = at::empty(sizes, tensor.options());
  gather(tensor, terms, "all_reduce");
  torch::Tensor sum = terms[0].to(at::toOpMathType(tensor.scalar_type()), /*non_blocking=*/false,
                                  /*copy=*/true);
  for (int peer = 1; peer < size(); ++peer) {
    sum.add_(terms[peer]);
  }
  tensor.copy_(sum);
}

void StoreCommunicator::do_broadcast(torch::Tensor& tensor, int root) {
  ++calls_;
  if (rank() != root) {
    receive(tensor, root, "broadcast");
    return;
  }
  for (int peer = 0; peer < size(); ++peer) {
    if (peer != root) {
      send(tensor, peer, "broadcast");
    }
  }
}

void StoreCommunicator::do_barrier() {
  gather(at::zeros({1}, at::kByte), at::empty({size(), 1}, at::kByte), "barrier");
}

std::shared_ptr<Communicator> StoreCommunicator::split(int color, int key) {
  const torch::Tensor all = at::empty({size(), 2}, at::kInt);
  gather(at::tensor({color, key}, at::kInt), all, "split");
  const auto ranks = all.accessor<int, 2>();
  std::vector<std::tuple<int, int>> members;  // key, rank
  for (int r = 0; r < size(); ++r) {
    if (ranks[r][0] == color) {
      members.emplace_back(ranks[r][1], r);
    }
  }
  std::sort(members.begin(), members.end());
  const auto self = std::find(members.begin(), members.end(), std::tuple(key, rank()));
  return std::make_shared<StoreCommunicator>(meeting_, c10::str(group_, '.', calls_, '.', color),
                                             static_cast<int>(self - members.begin()),
                                             static_cast<int>(members.size()), options_);
}

}  // namespace

c10::intrusive_ptr<c10d::Store> open_tcp_store(const std::string& host, int& port, bool serves,
                                               std::chrono::milliseconds deadline) {
  c10d::TCPStoreOptions options;
  options.port = static_cast<uint16_t>(port);
  options.isServer = serves;
  options.waitWorkers = false;
  options.timeout = deadline;
  try {
    auto store = c10::make_intrusive<c10d::TCPStore>(host, options);
    port = store->getPort();
    return store;
  } catch (const std::exception& error) {
    throw CommunicationError(c10::str(serves ? "cannot keep" : "cannot reach", " a store on ", host,
                                      ":", port, ": ", error.what()),
                             {0});
  }
}

std::shared_ptr<Communicator> make_store_communicator(c10::intrusive_ptr<c10d::Store> store,
                                                      int rank, int size,
                                                      const CommunicatorOptions& options) {
  auto meeting = std::make_shared<Meeting>(std::move(store), rank, size);
  return std::make_shared<StoreCommunicator>(std::move(meeting), "world", rank, size, options);
}

std::shared_ptr<Communicator> make_store_communicator(const std::string& host, int port, int rank,
                                                      int size,
                                                      const CommunicatorOptions& options) {
  check_input(size >= 1 && rank >= 0 && rank < size, "make_store_communicator: rank ", rank, " of ",
              size);
  check_input(port >= (size == 1 ? 0 : 1) && port <= 65535, "make_store_communicator: port ", port);
  check_input(options.deadline.count() > 0, "make_store_communicator: the deadline is ",
              options.deadline.count(), " ms, expected more than 0");
  return make_store_communicator(open_tcp_store(host, port, rank == 0, options.deadline), rank,
                                 size, options);
}

}  // namespace anabranch
