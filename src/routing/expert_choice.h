#pragma once

#include <anabranch/routing.h>

namespace anabranch {

/// [T, E] int64: e in column e where expert e takes the token, −1 where it does not (Gate::kExpertChoice). `logits`
/// [T, E] in sequences of equal length; tokens of `padding_mask` [T] count for nothing, nor does one whose softmax is
/// not finite. Of equal scores the first token's is taken.
torch::Tensor choose_tokens(const torch::Tensor& logits, const RoutingRule& rule,
                            const torch::Tensor& padding_mask, int64_t sequences);

}  // namespace anabranch
