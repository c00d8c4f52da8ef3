#pragma once

#include <anabranch/router.h>
#include <gtest/gtest.h>

#include <cmath>

#include "support/devices.h"

namespace anabranch::test {

/// That a token of x [30, h] which is not finite is named, and changes nobody else's choice.
inline void expect_token_left_out(Router& router, torch::Tensor x) {
  const auto without =
      router->forward(on_device(torch::cat({x.narrow(0, 0, 7), x.narrow(0, 8, 22)})));
  x[7][2] = std::nan("");
  const auto routing = router->forward(on_device(x));
  EXPECT_EQ(routing.first_nonfinite_token.item<int64_t>(), 7);
  EXPECT_TRUE(routing.expert_ids.narrow(0, 0, 7).equal(without.expert_ids.narrow(0, 0, 7)));
  EXPECT_TRUE(routing.expert_ids.narrow(0, 8, 22).equal(without.expert_ids.narrow(0, 7, 22)));
}

}  // namespace anabranch::test
