// What NCCL's ranks tell each other, as bytes of whoever sends them.
#include "communicator/nccl/datagram.h"

#include <gtest/gtest.h>

#include <limits>
#include <numeric>

#include "support/random.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

// The authors' vectors: key 00 01 .. 0f, messages 00 01 .., of as many bytes as stand in front.
TEST(SipHash, IsThatOfItsAuthors) {
  const SipHashKey key = {0x0706050403020100, 0x0f0e0d0c0b0a0908};
  const std::vector<std::pair<size_t, uint64_t>> expected = {
      {0, 0x726fdb47dd0e0e31}, {1, 0x74f839c593dc67fd}, {2, 0x0d6c8009d9a94f5a},
      {3, 0x85676696d7fb7e2d}, {4, 0xcf2794e0277187b7}, {5, 0x18765564cd99a68d},
      {6, 0xcbc9466e58fee3ce}, {7, 0xab0200f58b01d137}, {8, 0x93f5f5799a932462},
      {9, 0x9e0082df0ba9e4b0}, {15, 0xa129ca6149be45e5}};
  std::string message(64, '\0');
  std::iota(message.begin(), message.end(), '\0');
  for (const auto& [bytes, hash] : expected) {
    EXPECT_EQ(siphash(key, message.data(), bytes), hash) << bytes;
  }
}

constexpr int kRanks = 9;

class DatagramTest : public ::testing::Test {
 protected:
  HeartbeatDatagram draw() {
    HeartbeatDatagram datagram;
    datagram.rank = static_cast<int>(random_.integer(0, kRanks - 1));
    datagram.number = random_.next();
    datagram.started = random_.integer(0, int64_t{1} << 40);
    datagram.ended = random_.integer(0, datagram.started);
    if (random_.chance(0.7)) {
      NcclFailure& failure = datagram.failure.emplace();
      for (int64_t i = random_.integer(0, HeartbeatDatagram::kMostCulprits); i > 0; --i) {
        failure.culprits.push_back(static_cast<int>(random_.integer(0, kRanks - 1)));
      }
      failure.text = random_bytes(random_.integer(0, HeartbeatDatagram::kMostText));
    }
    return datagram;
  }
  std::string random_bytes(int64_t length) {
    std::string bytes(static_cast<size_t>(length), '\0');
    for (char& byte : bytes) {
      byte = static_cast<char>(random_.integer(0, 255));
    }
    return bytes;
  }
  /// `bytes` without their signature, signed.
  std::string signed_anew(std::string bytes) const {
    const uint64_t signature = siphash(key_, bytes.data(), bytes.size());
    return bytes.append(reinterpret_cast<const char*>(&signature), sizeof(signature));
  }
  static std::string unsigned_part(const std::string& bytes) {
    return bytes.substr(0, bytes.size() - sizeof(uint64_t));
  }
  static void expect_equal(const HeartbeatDatagram& left, const HeartbeatDatagram& right) {
    EXPECT_EQ(left.rank, right.rank);
    EXPECT_EQ(left.number, right.number);
    EXPECT_EQ(left.started, right.started);
    EXPECT_EQ(left.ended, right.ended);
    ASSERT_EQ(left.failure.has_value(), right.failure.has_value());
    if (left.failure.has_value()) {
      EXPECT_EQ(left.failure->text, right.failure->text);
      EXPECT_EQ(left.failure->culprits, right.failure->culprits);
    }
  }
  Random random_{test_seed()};
  SipHashKey key_ = {random_.next(), random_.next()};
};

TEST_F(DatagramTest, ComesAsItWentWithTheKeyAlone) {
  for (int64_t i = effort(300); i > 0; --i) {
    const HeartbeatDatagram datagram = draw();
    const std::string bytes = encode(datagram, key_);
    ASSERT_LE(bytes.size(), HeartbeatDatagram::kMostBytes);
    const auto decoded = decode(bytes, key_, kRanks);
    ASSERT_TRUE(decoded.has_value());
    expect_equal(*decoded, datagram);
    EXPECT_FALSE(decode(bytes, {key_[0] ^ 1, key_[1]}, kRanks).has_value());
    EXPECT_FALSE(decode(bytes, {key_[0], key_[1] ^ (uint64_t{1} << 63)}, kRanks).has_value());
    EXPECT_FALSE(decode(bytes, key_, datagram.rank).has_value());  // of a group of fewer ranks
  }
}

TEST_F(DatagramTest, TellsWhatThereIsRoomFor) {
  HeartbeatDatagram datagram;
  datagram.failure = NcclFailure{std::string(5000, 'x'), std::vector<int>(1000, 3)};
  const auto decoded = decode(encode(datagram, key_), key_, kRanks);
  ASSERT_TRUE(decoded.has_value());
  EXPECT_EQ(decoded->failure->text, std::string(HeartbeatDatagram::kMostText, 'x'));
  EXPECT_EQ(decoded->failure->culprits, std::vector<int>(HeartbeatDatagram::kMostCulprits, 3));
}

TEST_F(DatagramTest, NoByteCanBeChangedWithoutTheKey) {
  for (int64_t i = effort(300); i > 0; --i) {
    std::string bytes = encode(draw(), key_);
    const auto place = static_cast<size_t>(random_.integer(0, std::ssize(bytes) - 1));
    bytes[place] = static_cast<char>(bytes[place] ^ (1 << random_.integer(0, 7)));
    EXPECT_FALSE(decode(bytes, key_, kRanks).has_value());
    EXPECT_FALSE(decode(bytes.substr(0, place), key_, kRanks).has_value());
    EXPECT_FALSE(decode(random_bytes(random_.integer(0, 3000)), key_, kRanks).has_value());
  }
}

TEST_F(DatagramTest, RefusesAnyFieldOutOfBounds) {
  HeartbeatDatagram datagram;
  datagram.started = 7;
  datagram.failure = NcclFailure{"no more", {1, 2}};
  const std::string good = unsigned_part(encode(datagram, key_));
  ASSERT_TRUE(decode(signed_anew(good), key_, kRanks).has_value());
  // Where the fields are: magic 0, rank 4, number 8, started 16, ended 24, culprits' and text's lengths
  // 32, 34, culprits from 36.
  const auto with = [&](size_t place, auto value) {
    std::string bytes = good;
    std::memcpy(bytes.data() + place, &value, sizeof(value));
    return signed_anew(bytes);
  };
  EXPECT_FALSE(decode(with(0, uint32_t{0}), key_, kRanks).has_value());
  for (const int32_t rank : {-1, kRanks, std::numeric_limits<int32_t>::min()}) {
    EXPECT_FALSE(decode(with(4, rank), key_, kRanks).has_value()) << rank;
    EXPECT_FALSE(decode(with(40, rank), key_, kRanks).has_value()) << rank;
  }
  EXPECT_FALSE(decode(with(16, int64_t{-1}), key_, kRanks).has_value());
  for (const int64_t ended : {int64_t{-1}, datagram.started + 1}) {
    EXPECT_FALSE(decode(with(24, ended), key_, kRanks).has_value()) << ended;
  }
  for (const uint16_t count : {uint16_t{3}, uint16_t{65}, uint16_t{0xffff}}) {
    EXPECT_FALSE(decode(with(32, count), key_, kRanks).has_value()) << count;
    EXPECT_FALSE(decode(with(34, static_cast<uint16_t>(count + 7)), key_, kRanks).has_value());
  }
  EXPECT_FALSE(decode(signed_anew(good + 'x'), key_, kRanks).has_value());
}

}  // namespace
}  // namespace anabranch::test
