#include "kernels/kernels_fixture.h"

namespace anabranch::test {
namespace {

class LossesTest : public KernelsTest {};
ANABRANCH_FOR_EACH_DEVICE(LossesTest);

TEST_P(LossesTest, BatchLossesEqualTheirFormulas) {
  for (const auto dtype : {torch::kFloat32, torch::kFloat64}) {
    for (const int64_t experts : {1, 7, 64, 255, 256, 1000}) {
      for (const int64_t tokens : {0, 1, 5000}) {
        const auto counts = (random_.uniform({experts}) * 100).floor().to(torch::kInt64);
        const RoutingSums own{random_.uniform({experts}).to(dtype), random_.uniform({}).to(dtype)};
        const auto sums =
            routing_.batch_sums(on_device(counts), tokens,
                                {on_device(own.probabilities), on_device(own.squared_logsumexp)});
        const auto expected_sums =
            torch::cat({counts.to(torch::kFloat64), torch::full({1}, tokens, torch::kFloat64),
                        own.probabilities.to(torch::kFloat64),
                        own.squared_logsumexp.reshape(1).to(torch::kFloat64)});
        EXPECT_TRUE(identical(sums.cpu(), expected_sums));
        const auto chosen =
            random_.chance(0.5) ? counts.to(torch::kFloat64) : random_.uniform({experts});
        const int64_t top_k = random_.integer(1, 8);
        const auto losses = routing_.batch_losses(sums, on_device(chosen), top_k, dtype);

        const double all = static_cast<double>(std::max<int64_t>(tokens, 1));
        const auto* choice = chosen.const_data_ptr<double>();
        const auto* sum = expected_sums.const_data_ptr<double>();
        const auto slopes = losses.balance_slope.cpu();
        double balance = 0;
        for (int64_t e = 0; e < experts; ++e) {
          const double slope =
              choice[e] * static_cast<double>(experts) / static_cast<double>(top_k) / all / all;
          EXPECT_NEAR(slopes[e].item<double>(), slope, 1e-14 * slope);
          balance += slope * sum[experts + 1 + e];
        }
        const double z = sum[2 * experts + 1] / all;
        const double roundoff = dtype == torch::kFloat32 ? 6e-8 : 1e-12;
        EXPECT_EQ(losses.balance.scalar_type(), dtype);
        EXPECT_EQ(losses.z.scalar_type(), dtype);
        EXPECT_NEAR(losses.balance.item<double>(), balance, roundoff * balance);
        EXPECT_NEAR(losses.z.item<double>(), z, roundoff * z);
        EXPECT_NEAR(losses.z_slope.item<double>(), 1 / all, 1e-15);
        EXPECT_EQ(numbers(losses.expert_load), numbers(counts));
      }
    }
  }
}

TEST_P(LossesTest, OfOneRankTheyAreThoseOfItsBatch) {
  for (const auto dtype : {torch::kFloat32, torch::kFloat64}) {
    for (const int64_t experts : {1, 7, 255, 256, 1000}) {
      for (const int64_t tokens : {0, 1, 5000}) {
        const auto counts = on_device((random_.uniform({experts}) * 100).floor().to(torch::kInt64));
        const RoutingSums own{on_device(random_.uniform({experts}).to(dtype)),
                              on_device(random_.uniform({}).to(dtype))};
        const int64_t top_k = random_.integer(1, 8);
        const auto found = routing_.losses_of_one(counts, tokens, own, top_k);
        const auto sums = routing_.batch_sums(counts, tokens, own);
        const auto expected = routing_.batch_losses(sums, sums.narrow(0, 0, experts), top_k, dtype);
        EXPECT_TRUE(identical(found.balance.cpu(), expected.balance.cpu()));
        EXPECT_TRUE(identical(found.z.cpu(), expected.z.cpu()));
        EXPECT_TRUE(identical(found.balance_slope.cpu(), expected.balance_slope.cpu()));
        EXPECT_TRUE(identical(found.z_slope.cpu(), expected.z_slope.cpu()));
        EXPECT_EQ(numbers(found.expert_load), numbers(counts));
      }
    }
  }
}

}  // namespace
}  // namespace anabranch::test
