#pragma once

namespace anabranch {

/// Added to sums of scores that others are divided by, as DeepSeek-V3's router does.
constexpr double kLeastScoreSum = 1e-20;

/// Below this logit x, √log(1 + e^x) is e^(x/2) in fp64 as well.
constexpr double kSmallSoftplusLogit = -40;

}  // namespace anabranch
