#include "experts/permute.h"

#include <gtest/gtest.h>

#include "support/collectives.h"
#include "support/devices.h"
#include "support/routing_case.h"
#include "support/tolerance.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

// ⟨permute x, y⟩ = ⟨x, unpermute y⟩ on the plan of a real routing, and with weights
// ⟨w ∘ permute x, y⟩ = ⟨x, unpermute(y, w)⟩.
TEST(PermuteTest, UnpermuteIsTheAdjoint) {
  Random random(test_seed());
  for (const auto& routed : routing_cases(random, world()->size(), effort(100))) {
    SCOPED_TRACE(routed.describe());
    const Exchange exchange(world(), routed.num_experts);
    Routing routing;
    routing.expert_ids = routed.local(routed.expert_ids, world()->rank());
    routing.weights = torch::ones_like(routing.expert_ids, torch::kFloat32);
    const auto plan = exchange.plan(routing);
    Random own(test_seed() + static_cast<uint64_t>(world()->rank()));
    const auto x = on_device(own.normal({plan.rows(), 5}));
    const auto y = on_device(own.normal({plan.assignments(), 5}));
    const auto weights = on_device(own.normal({plan.assignments()}));
    const auto permuted = permute(x, plan);
    const auto length = 10 * (plan.rows() + plan.assignments());

    EXPECT_NEAR((permuted * y).sum().item<double>(),
                (x * unpermute(y, {}, plan)).sum().item<double>(),
                tolerance(torch::kFloat64, length, (permuted * y).abs().sum().item<double>()));
    const auto weighted = permuted * weights.unsqueeze(1);
    EXPECT_NEAR((weighted * y).sum().item<double>(),
                (x * unpermute(y, weights, plan)).sum().item<double>(),
                tolerance(torch::kFloat64, length, (weighted * y).abs().sum().item<double>()));
  }
}

}  // namespace
}  // namespace anabranch::test
