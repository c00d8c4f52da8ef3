#include "communicator/store/store.h"

#include <anabranch/error.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <cstring>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>
#include <utility>

#include "communicator/errors.h"
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

  /// For one thread: a wait holds up all else that goes through it.
  c10::intrusive_ptr<c10d::Store> store() { return store_; }
  /// For another one.
  c10::intrusive_ptr<c10d::Store> another_way() { return store_->clone(); }

 private:
  static std::string left(int rank) { return c10::str("left/", rank); }

  c10::intrusive_ptr<c10d::Store> store_;
  int rank_;
  int size_;
};

/// Messages between host memories, each a key of the store that its receiver deletes.
class StoreCommunicator final : public Communicator {
 public:
  StoreCommunicator(std::shared_ptr<Meeting> meeting, c10::intrusive_ptr<c10d::Store> store,
                    std::string group, int rank, int size, CommunicatorOptions options)
      : Communicator(rank, size),
        meeting_(std::move(meeting)),
        store_(std::move(store)),
        group_(std::move(group)),
        options_(options) {}

  std::string name() const override { return "store"; }

 protected:
  std::unique_ptr<Pending> start(Collective call, Messages messages) override;
  std::shared_ptr<Communicator> regroup(const std::vector<int>& members, int rank) override {
    // No two groups have a first member and an exchange of their parent's in common.
    return std::make_shared<StoreCommunicator>(meeting_, meeting_->another_way(),
                                               c10::str(group_, '.', exchanges_, '.', members[0]),
                                               rank, static_cast<int>(members.size()), options_);
  }
  void check_device(torch::Device device) const override {
    check_input(device.is_cpu(), "the store communicator moves tensors in host memory, not on ",
                device);
  }

 private:
  class Receiving;
  /// Of a piece of the `number`th message that goes from one rank to another in an exchange.
  std::string key(int64_t exchange, int from, int to, int number, int64_t offset) const {
    return c10::str(group_, '/', exchange, '/', from, '/', to, '/', number, '/', offset);
  }
  void send(int64_t exchange, const Message& message, int number);
  void receive(int64_t exchange, const Message& message, int number);
  /// `move(message, number)` for all, which are numbered for each peer. `culprit`: whose fault it is where
  /// that fails; negative: the peer's.
  template <typename Move>
  void for_each(Collective call, const std::vector<Message>& messages, int culprit,
                const Move& move) const;

  std::shared_ptr<Meeting> meeting_;
  c10::intrusive_ptr<c10d::Store> store_;
  std::string group_;
  CommunicatorOptions options_;
  int64_t exchanges_ = 0;
};

void StoreCommunicator::send(int64_t exchange, const Message& message, int number) {
  const auto* data = reinterpret_cast<const uint8_t*>(message.source());
  for (int64_t begin = 0; begin < message.bytes; begin += kPieceBytes) {
    const int64_t end = std::min(begin + kPieceBytes, message.bytes);
    store_->set(key(exchange, rank(), message.peer, number, begin),
                std::vector<uint8_t>(data + begin, data + end));
  }
}

void StoreCommunicator::receive(int64_t exchange, const Message& message, int number) {
  for (int64_t begin = 0; begin < message.bytes; begin += kPieceBytes) {
    const std::string piece = key(exchange, message.peer, rank(), number, begin);
    store_->wait({piece}, options_.deadline);
    const std::vector<uint8_t> value = store_->get(piece);
    store_->deleteKey(piece);
    const auto expected = static_cast<size_t>(std::min(kPieceBytes, message.bytes - begin));
    check_input(value.size() == expected, value.size(), " bytes came where ", expected,
                " were expected: the ranks' arguments do not fit");
    std::memcpy(message.target() + begin, value.data(), expected);
  }
}

template <typename Move>
void StoreCommunicator::for_each(Collective call, const std::vector<Message>& messages, int culprit,
                                 const Move& move) const {
  std::vector<int> moved(size(), 0);
  for (const Message& message : messages) {
    try {
      move(message, moved[message.peer]++);
    } catch (const std::exception& error) {
      throw waited_in_vain(rank(), call, options_, culprit < 0 ? message.peer : culprit,
                           error.what());
    }
  }
}

/// All that goes out is in the store: what is left is to take what comes.
class StoreCommunicator::Receiving final : public Pending {
 public:
  Receiving(StoreCommunicator& communicator, Collective call, std::vector<Message> incoming)
      : communicator_(communicator),
        call_(call),
        incoming_(std::move(incoming)),
        exchange_(communicator.exchanges_) {}

  void finish() override {
    communicator_.for_each(call_, incoming_, /*culprit=*/-1,
                           [&](const Message& message, int number) {
                             communicator_.receive(exchange_, message, number);
                           });
  }

 private:
  StoreCommunicator& communicator_;
  Collective call_;
  std::vector<Message> incoming_;
  int64_t exchange_;
};

std::unique_ptr<Pending> StoreCommunicator::start(Collective call, Messages messages) {
  ++exchanges_;
  // What cannot be sent is the fault of rank 0, which keeps the store.
  for_each(call, messages.outgoing, /*culprit=*/0,
           [&](const Message& message, int number) { send(exchanges_, message, number); });
  return std::make_unique<Receiving>(*this, call, std::move(messages.incoming));
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
  auto way = meeting->store();
  return std::make_shared<StoreCommunicator>(std::move(meeting), std::move(way), "world", rank,
                                             size, options);
}

std::shared_ptr<Communicator> make_store_communicator(const std::string& host, int port, int rank,
                                                      int size,
                                                      const CommunicatorOptions& options) {
  check_input(size >= 1 && rank >= 0 && rank < size, "make_store_communicator: rank ", rank, " of ",
              size);
  check_input(port >= (size == 1 ? 0 : 1) && port <= 65535, "make_store_communicator: port ", port);
  check_options("make_store_communicator", options);
  return make_store_communicator(open_tcp_store(host, port, rank == 0, options.deadline), rank,
                                 size, options);
}

}  // namespace anabranch
