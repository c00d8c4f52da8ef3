// How ranks find each other at a store; what they move there, communicator_test says.
#include "communicator/store/store.h"

#include <gtest/gtest.h>

#include <functional>
#include <map>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>

#include "communicator/agreement.h"
#include "support/process_group.h"
#include "support/random.h"
#include "support/thrown.h"
#include "support/tolerance.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

/// A port that was free a moment ago, the same on every rank.
int free_port() {
  int port = 0;
  if (world()->rank() == 0) {
    open_tcp_store("127.0.0.1", port, /*serves=*/true, std::chrono::seconds(10));
  }
  return std::stoi(all_gather_strings(*world(), std::to_string(port))[0]);
}

TEST(Store, RanksMeetAtAnAddress) {
  const auto store =
      make_store_communicator("127.0.0.1", free_port(), world()->rank(), world()->size());
  EXPECT_EQ(store->name(), "store");
  const auto texts = all_gather_strings(*store, std::string(store->rank(), 'x'));
  for (int rank = 0; rank < store->size(); ++rank) {
    EXPECT_EQ(texts[rank], std::string(rank, 'x'));
  }
}

TEST(Store, MovesMoreThanItsValuesHold) {
  const auto store =
      make_store_communicator("127.0.0.1", free_port(), world()->rank(), world()->size());
  const auto tensor = torch::arange(int64_t{9} << 17) + store->rank();  // 9 MiB
  const auto gathered = store->all_gather(tensor);
  for (int rank = 0; rank < store->size(); ++rank) {
    EXPECT_TRUE(identical(gathered[rank], tensor - store->rank() + rank));
  }
}

TEST(Store, NamesTheRankThatDoesNotCome) {
  ANABRANCH_NEEDS_RANKS(2);
  const CommunicatorOptions options = {std::chrono::milliseconds(500)};
  const int culprit = world()->size() - 1;
  const auto store =
      make_store_communicator("127.0.0.1", free_port(), world()->rank(), world()->size(), options);
  if (world()->rank() != culprit) {
    const auto thrown = thrown_by([&] { store->barrier(); });
    EXPECT_EQ(thrown.kind, Thrown::Kind::kCommunication) << thrown;
    EXPECT_TRUE(thrown.says("barrier waited up to 0.5 s")) << thrown;
    if (world()->size() == 2) {
      EXPECT_EQ(thrown.peers, std::vector<int>{culprit});
    }
  }
  world()->barrier();
}

/// Counts the bytes of what is kept in it and taken from it.
class CountingStore final : public c10d::PrefixStore {
 public:
  using PrefixStore::PrefixStore;
  using PrefixStore::set;
  void set(const std::string& key, const std::vector<uint8_t>& value) override {
    kept += static_cast<int64_t>(value.size());
    PrefixStore::set(key, value);
  }
  std::vector<uint8_t> get(const std::string& key) override {
    auto value = PrefixStore::get(key);
    taken += static_cast<int64_t>(value.size());
    return value;
  }
  int64_t kept = 0;
  int64_t taken = 0;
};

TEST(Store, TrafficIsWhatMoved) {
  const auto deadline = std::chrono::seconds(60);
  const auto counting =
      c10::make_intrusive<CountingStore>("counting", open_shared_store(*world(), deadline));
  const int size = world()->size();
  const auto store = make_store_communicator(counting, world()->rank(), size, {deadline});
  Random random(test_seed());
  const int64_t elements = random.integer(1, 50);
  const std::map<std::string, std::function<void()>> collectives = {
      {"all_to_all_v",
       [&] {
         const std::vector<int64_t> rows(size, 2);
         const auto send = torch::ones({2 * size, elements});
         store->all_to_all_v({{send, rows, torch::empty_like(send), rows}});
       }},
      {"all_reduce",
       [&] {
         auto tensor = torch::ones({elements}, torch::kFloat64);
         store->all_reduce(tensor);
       }},
      {"all_gather", [&] { store->all_gather(torch::ones({elements}, torch::kHalf)); }},
      {"broadcast",
       [&] {
         auto tensor = torch::ones({elements});
         store->broadcast(tensor, size - 1);
       }},
      {"barrier", [&] { store->barrier(); }},
      {"split", [&] { store->split(0, 0); }},
  };
  for (const auto& [name, call] : collectives) {
    store->reset_traffic();
    counting->kept = counting->taken = 0;
    call();
    EXPECT_EQ(store->traffic().bytes_sent, counting->kept) << name;
    EXPECT_EQ(store->traffic().bytes_received, counting->taken) << name;
  }
}

TEST(Store, RefusesWrongArguments) {
  EXPECT_INPUT_ERROR(make_store_communicator("127.0.0.1", 1234, 2, 2), "rank 2 of 2");
  EXPECT_INPUT_ERROR(make_store_communicator("127.0.0.1", 0, 0, 2), "port 0");
  EXPECT_INPUT_ERROR(make_store_communicator("127.0.0.1", 70000, 0, 1), "port 70000");
  EXPECT_INPUT_ERROR(make_store_communicator("127.0.0.1", 0, 0, 1, {std::chrono::milliseconds(0)}),
                     "deadline is 0 ms");
}

}  // namespace
}  // namespace anabranch::test
