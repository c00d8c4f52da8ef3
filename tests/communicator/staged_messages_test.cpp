#include "communicator/staged_messages.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

#include "support/random.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

std::string bytes_of(const Message& message) {
  return {reinterpret_cast<const char*>(message.source()), static_cast<size_t>(message.bytes)};
}

/// Messages of random places in two tensors: alone, one behind another, and the same for several ranks.
std::vector<Message> draw(Random& random, const std::vector<torch::Tensor>& tensors, bool again) {
  std::vector<Message> messages;
  for (const auto& tensor : tensors) {
    const auto size = static_cast<int64_t>(tensor.nbytes());
    for (int64_t begin = random.integer(0, 9); begin < size;) {
      const int64_t bytes = random.integer(1, std::min<int64_t>(size - begin, 40));
      messages.push_back({static_cast<int>(random.integer(0, 5)), tensor, begin, bytes});
      for (; again && random.chance(0.3);) {
        messages.push_back({static_cast<int>(random.integer(0, 5)), tensor, begin, bytes});
      }
      begin += bytes + (random.chance(0.5) ? 0 : random.integer(1, 9));
    }
  }
  return messages;
}

TEST(StagedMessages, CarryTheSameBytesForTheSameRanks) {
  Random random(test_seed());
  const auto tensors = [&] {
    return std::vector<torch::Tensor>{
        (random.uniform({7, 31}) * 256).to(torch::kUInt8),
        (random.uniform({random.integer(1, 60)}) * 1000).to(torch::kInt32)};
  };
  for (int64_t i = effort(50); i > 0; --i) {
    const auto from = tensors();
    const auto to = tensors();
    const std::vector<torch::Tensor> before = {to[0].clone(), to[1].clone()};
    const Messages messages{torch::kCPU, draw(random, from, /*again=*/true),
                            draw(random, to, /*again=*/false)};
    const StagedMessages staged(messages, torch::kCPU);

    const auto& outgoing = staged.messages().outgoing;
    ASSERT_EQ(outgoing.size(), messages.outgoing.size());
    for (size_t m = 0; m < outgoing.size(); ++m) {
      EXPECT_EQ(outgoing[m].peer, messages.outgoing[m].peer);
      EXPECT_EQ(bytes_of(outgoing[m]), bytes_of(messages.outgoing[m]));
    }
    // What comes is brought where it belongs, and nothing beside it is touched.
    std::vector<torch::Tensor> expected = {before[0].clone(), before[1].clone()};
    for (size_t m = 0; m < messages.incoming.size(); ++m) {
      const Message& original = messages.incoming[m];
      const Message& arrived = staged.messages().incoming[m];
      EXPECT_EQ(arrived.peer, original.peer);
      ASSERT_EQ(arrived.bytes, original.bytes);
      const auto value = static_cast<int>(random.integer(0, 255));
      std::memset(arrived.target(), value, static_cast<size_t>(arrived.bytes));
      const auto& place = expected[original.tensor.is_same(to[0]) ? 0 : 1];
      std::memset(static_cast<char*>(place.data_ptr()) + original.begin, value,
                  static_cast<size_t>(original.bytes));
    }
    staged.bring_back();
    EXPECT_TRUE(to[0].equal(expected[0]) && to[1].equal(expected[1]));
  }
}

}  // namespace
}  // namespace anabranch::test
