#include "kernels/kernels_fixture.h"

namespace anabranch::test {
namespace {

class SplitTest : public KernelsTest {};
ANABRANCH_FOR_EACH_DEVICE(SplitTest);

TEST_P(SplitTest, ThePartsSumToAllDigits) {
  for (const auto& [m, n] : {std::pair<int64_t, int64_t>{0, 5}, {1, 1}, {7, 300}, {65, 8}}) {
    const auto x = random_.normal({m, n}, torch::kFloat32);
    const auto parts = gate_.split(on_device(x), {0, 1, 2}, false).cpu();
    ASSERT_EQ(parts.sizes(), (std::vector<int64_t>{3, m, n}));
    EXPECT_EQ(parts.scalar_type(), torch::kBFloat16);
    // Three times the 8 bits of bf16 are fp32's 24.
    EXPECT_TRUE(identical(parts.to(torch::kFloat64).sum(0), x.to(torch::kFloat64)));
    EXPECT_TRUE(identical(parts[0], x.to(torch::kBFloat16)));
  }
}

TEST_P(SplitTest, PutsPartsWhereTheyAreWanted) {
  const auto x = on_device(random_.normal({9, 20}, torch::kFloat32));
  const auto parts = gate_.split(x, {0, 1, 2}, false).cpu();
  const auto above = gate_.split(x, {0, 0, 1}, false).cpu();
  EXPECT_TRUE(identical(above, torch::stack({parts[0], parts[0], parts[1]})));
  const auto beside = gate_.split(x, {0, 2, 0}, true).cpu();
  EXPECT_TRUE(identical(beside, torch::stack({parts[0], parts[2], parts[0]}, 1)));
}

}  // namespace
}  // namespace anabranch::test
