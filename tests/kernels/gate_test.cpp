#include "kernels/kernels_fixture.h"

namespace anabranch::test {
namespace {

class SplitTest : public KernelsTest {};
ANABRANCH_FOR_EACH_DEVICE(SplitTest);

TEST_P(SplitTest, ThePartsSumToAllDigits) {
  for (const auto& [m, n] : {std::pair<int64_t, int64_t>{0, 5}, {1, 1}, {7, 300}, {65, 8}}) {
    const auto x = random_.normal({m, n}, torch::kFloat32);
    const auto places = gate_.split(on_device(x), {0, 1, 2, 0}, false).cpu();
    ASSERT_EQ(places.sizes(), (std::vector<int64_t>{4, m, n}));
    const auto parts = places.narrow(0, 0, 3);
    EXPECT_EQ(parts.scalar_type(), torch::kBFloat16);
    // Three times the 8 bits of bf16 are fp32's 24.
    EXPECT_TRUE(identical(parts.to(torch::kFloat64).sum(0), x.to(torch::kFloat64)));
    EXPECT_TRUE(identical(parts[0], x.to(torch::kBFloat16)));
  }
}

TEST_P(SplitTest, PutsPartsWhereTheyAreWanted) {
  const auto x = on_device(random_.normal({9, 20}, torch::kFloat32));
  const auto parts = gate_.split(x, {0, 1, 2, 2}, false).cpu();
  const auto above = gate_.split(x, {0, 0, 1, 2}, false).cpu();
  EXPECT_TRUE(identical(above, torch::stack({parts[0], parts[0], parts[1], parts[2]})));
  const auto beside = gate_.split(x, {2, 0, 1, 0}, true).cpu();
  EXPECT_TRUE(identical(beside, torch::stack({parts[2], parts[0], parts[1], parts[0]}, 1)));
}

// Whole numbers, whose sums are exact: a piece or place that is missed or taken twice shows. Then numbers of
// very different size in the places, whose order shows.
TEST_P(SplitTest, SumsPiecesAndThenPlacesInTheirOrder) {
  for (const int64_t pieces : {0, 1, 3, 4, 9}) {
    for (const bool has_rest : {pieces == 0, true}) {
      const auto whole = [&](at::IntArrayRef sizes) {
        return (random_.uniform(sizes) * 100).floor().to(torch::kFloat32);
      };
      const auto values = whole({pieces, 3, 7, 45});
      const auto rest = has_rest ? whole({3, 7, 45}) : torch::Tensor();
      const auto found =
          gate_.sum_split(on_device(values), has_rest ? on_device(rest) : rest, {1, 2, 0});
      auto expected = values.sum(at::IntArrayRef{0, 1});
      if (has_rest) expected = expected + rest.sum(0);
      EXPECT_TRUE(identical(found.cpu(), expected)) << pieces << " pieces";
    }
  }
  const auto scales = torch::tensor({1e-7F, 1.0F, 1e-4F}).view({1, 3, 1, 1});
  const auto apart = random_.normal({1, 3, 5, 33}, torch::kFloat32) * scales;
  const auto found = gate_.sum_split(on_device(apart), {}, {1, 2, 0}).cpu();
  EXPECT_TRUE(identical(found, apart[0][1] + apart[0][2] + apart[0][0]));
}

// The router's backward kernels split what they find themselves.
TEST_P(SplitTest, TheLogitsGradientComesApart) {
  for (const auto score : {RouterScore::kSoftmax, RouterScore::kSigmoid}) {
    for (const auto& [tokens, experts] : {std::pair<int64_t, int64_t>{0, 8}, {33, 5}, {70, 130}}) {
      RoutingRule rule;
      rule.top_k = std::min<int64_t>(experts, 3);
      rule.router_score = score;
      const auto logits = on_device(random_.normal({tokens, experts}, torch::kFloat32));
      auto routed = routing_.route(logits, rule, {});
      if (score == RouterScore::kSigmoid) routed.probabilities = logits;
      const auto dweights = on_device(random_.normal({tokens, rule.top_k}, torch::kFloat32));
      const auto dsum = on_device(random_.normal({experts}, torch::kFloat32));
      const auto dlogits = routing_.route_backward(routed, rule, dweights, dsum, {});
      const auto apart = routing_.route_backward(routed, rule, dweights, dsum, {}, /*split=*/true);
      EXPECT_TRUE(identical(apart.cpu(), gate_.split(dlogits, kSplitGradient, true).cpu()));
    }
  }
}

// Of very different size: another order of the same sum shows.
TEST_P(SplitTest, PartsAreAddedInTheirOrder) {
  for (const auto& [m, n] : {std::pair<int64_t, int64_t>{0, 5}, {4100, 1}, {300, 3}, {65, 130}}) {
    const auto scales = torch::tensor({1.0F, 1e-2F, 1e-4F}).view({1, 3, 1});
    const auto parts = random_.normal({m, 3, n}, torch::kFloat32) * scales;
    const auto expected = parts.select(1, 0) + parts.select(1, 1) + parts.select(1, 2);
    EXPECT_TRUE(identical(gate_.sum_parts(on_device(parts)).cpu(), expected)) << m << " x " << n;
  }
}

// On a GPU the gate's product leaves its three parts to the router.
TEST_P(SplitTest, LogitsMayBeSums) {
  if (GetParam().is_cpu()) {
    return;
  }
  for (const auto& [tokens, experts] :
       {std::pair<int64_t, int64_t>{0, 8}, {4100, 1}, {33, 5}, {70, 130}, {9, 1500}}) {
    RoutingRule rule;
    rule.top_k = std::min<int64_t>(experts, 3);
    const auto parts = on_device(random_.normal({tokens, 3, experts}, torch::kFloat32));
    const auto logits = gate_.sum_parts(parts);
    const auto found = routing_.route(parts, rule, {});
    const auto expected = routing_.route(logits, rule, {});
    EXPECT_TRUE(identical(found.expert_ids.cpu(), expected.expert_ids.cpu()));
    EXPECT_TRUE(identical(found.weights.cpu(), expected.weights.cpu()));
    EXPECT_TRUE(identical(found.probabilities.cpu(), expected.probabilities.cpu()));
    EXPECT_TRUE(identical(found.logsumexp.cpu(), expected.logsumexp.cpu()));
    EXPECT_EQ(numbers(found.counts), numbers(expected.counts));
  }
}

}  // namespace
}  // namespace anabranch::test
