#include "communicator/agreement.h"

#include <anabranch/agreement.h>
#include <gtest/gtest.h>

#include <stdexcept>

#include "support/thrown.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

using Fields = std::vector<std::pair<std::string, std::string>>;

/// What check_agreement throws on this rank when `odd` brings other fields than the rest.
Thrown disagree(int odd, const Fields& fields, const Fields& other_fields) {
  return thrown_by(
      [&] { check_agreement(*world(), world()->rank() == odd ? other_fields : fields); });
}

std::vector<int> ranks_from(int first) {
  std::vector<int> ranks;
  for (int rank = first; rank < world()->size(); ++rank) {
    ranks.push_back(rank);
  }
  return ranks;
}

TEST(AllGatherStrings, KeepsLengthsAndBytes) {
  for (const size_t factor : {0, 1, 1000}) {
    const auto text_of = [&](int rank) { return std::string(factor * rank, '\0') + "ä€"; };
    const auto texts = all_gather_strings(*world(), text_of(world()->rank()));
    ASSERT_EQ(texts.size(), static_cast<size_t>(world()->size()));
    for (int rank = 0; rank < world()->size(); ++rank) {
      EXPECT_EQ(texts[rank], text_of(rank));
    }
  }
  EXPECT_EQ(all_gather_strings(*world(), "").back(), "");
}

TEST(Agreement, PassesWhereAllAgree) {
  check_agreement(*world(), {{"hidden_size", "64"}, {"engine", ""}, {"", "x"}});
  check_agreement(*world(), {});
}

TEST(Agreement, NamesRankFieldAndBothValues) {
  ANABRANCH_NEEDS_RANKS(2);
  for (int odd = 1; odd < world()->size(); ++odd) {
    const auto thrown = disagree(odd, {{"hidden_size", "64"}, {"top_k", "2"}},
                                 {{"hidden_size", "64"}, {"top_k", "3"}});
    EXPECT_EQ(thrown.kind, Thrown::Kind::kCommunication) << thrown;
    EXPECT_TRUE(thrown.says("rank " + std::to_string(odd) + " has top_k = 3 where rank 0 has 2"))
        << thrown;
    EXPECT_FALSE(thrown.says("hidden_size")) << thrown;
    EXPECT_EQ(thrown.peers, std::vector<int>{odd});
  }
}

TEST(Agreement, NamesEveryRankThatDiffersFromRankZero) {
  ANABRANCH_NEEDS_RANKS(2);
  const auto thrown =
      disagree(0, {{"top_k", "2"}, {"type", "fp32"}}, {{"top_k", "4"}, {"type", ""}});
  EXPECT_EQ(thrown.peers, ranks_from(1));
  for (const int rank : ranks_from(1)) {
    EXPECT_TRUE(thrown.says("rank " + std::to_string(rank) + " has top_k = 2 where rank 0 has 4"))
        << thrown;
    EXPECT_TRUE(thrown.says("has type = fp32 where rank 0 has ")) << thrown;
  }
}

TEST(Agreement, FindsOtherNamesAndNumbersOfFields) {
  ANABRANCH_NEEDS_RANKS(2);
  const auto more = disagree(1, {{"top_k", "2"}}, {{"top_k", "2"}, {"glu", "1"}});
  EXPECT_EQ(more.kind, Thrown::Kind::kCommunication) << more;
  EXPECT_TRUE(more.says("rank 1 has the 2 fields (top_k, glu) where rank 0 has 1 (top_k)")) << more;
  const auto other = disagree(1, {{"top_k", "2"}}, {{"glu", "2"}});
  EXPECT_TRUE(other.says("rank 1 has the 1 fields (glu) where rank 0 has 1 (top_k)")) << other;
  const auto none = disagree(1, {{"top_k", "2"}}, {});
  EXPECT_EQ(none.peers, std::vector<int>{1}) << none;
}

TEST(Agreement, LeavesTheCommunicatorUsable) {
  ANABRANCH_NEEDS_RANKS(2);
  EXPECT_EQ(disagree(1, {{"a", "1"}}, {{"a", "2"}}).kind, Thrown::Kind::kCommunication);
  auto sum = torch::ones({1});
  world()->all_reduce(sum);
  EXPECT_EQ(sum.item<float>(), world()->size());
}

/// Work that throws on every rank from `first` on, each time other words.
Thrown fail_from(int first, std::vector<std::string>& failures) {
  return thrown_by([&] {
    try {
      succeed_together(*world(), [&] {
        const int rank = world()->rank();
        if (rank >= first) throw std::runtime_error(std::string(1 + 100 * rank, 'x'));
      });
    } catch (const WorkError& error) {
      failures = error.failures();
      throw;
    }
  });
}

TEST(SucceedTogether, EveryRankIsToldWhatEachOneThrew) {
  for (int first = 0; first < world()->size(); ++first) {
    std::vector<std::string> failures;
    const auto thrown = fail_from(first, failures);
    EXPECT_EQ(thrown.kind, Thrown::Kind::kCommunication) << thrown;
    EXPECT_EQ(thrown.peers, ranks_from(first));
    ASSERT_EQ(failures.size(), static_cast<size_t>(world()->size()));
    for (int rank = 0; rank < world()->size(); ++rank) {
      EXPECT_EQ(failures[rank], rank < first ? "" : std::string(1 + 100 * rank, 'x'));
      EXPECT_EQ(thrown.says("rank " + std::to_string(rank) + ": x"), rank >= first) << thrown;
    }
  }
}

TEST(SucceedTogether, GoesOnWhereNoneThrows) {
  int runs = 0;
  succeed_together(*world(), [&] { ++runs; });
  EXPECT_EQ(runs, 1);
  EXPECT_EQ(world()->all_gather(torch::ones({1})).sum().item<int>(), world()->size());
}

}  // namespace
}  // namespace anabranch::test
