#pragma once

namespace anabranch {

/// Added to sums of scores that others are divided by, as DeepSeek-V3's router does.
constexpr double kLeastScoreSum = 1e-20;

}  // namespace anabranch
