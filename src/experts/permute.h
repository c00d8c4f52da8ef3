#pragma once

#include <anabranch/exchange.h>

namespace anabranch {

/// Received rows [R, h] into expert-major order [P, h].
torch::Tensor permute(const torch::Tensor& rows, const ExchangePlan& plan);

/// Expert-major rows [P, h] back into received rows [R, h]: each the sum of its assignments', weighted
/// by `weights` [P] where defined. Without weights the adjoint of permute.
torch::Tensor unpermute(const torch::Tensor& assignments, const torch::Tensor& weights,
                        const ExchangePlan& plan);

}  // namespace anabranch
