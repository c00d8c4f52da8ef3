// How ranks find each other at a store; what they move there, communicator_test says.
#include "communicator/store/store.h"

#include <gtest/gtest.h>

#include "communicator/agreement.h"
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

TEST(Store, RefusesWrongArguments) {
  EXPECT_INPUT_ERROR(make_store_communicator("127.0.0.1", 1234, 2, 2), "rank 2 of 2");
  EXPECT_INPUT_ERROR(make_store_communicator("127.0.0.1", 0, 0, 2), "port 0");
  EXPECT_INPUT_ERROR(make_store_communicator("127.0.0.1", 70000, 0, 1), "port 70000");
  EXPECT_INPUT_ERROR(make_store_communicator("127.0.0.1", 0, 0, 1, {std::chrono::milliseconds(0)}),
                     "deadline is 0 ms");
}

}  // namespace
}  // namespace anabranch::test
