#pragma once

#include <anabranch/routing.h>
#include <torch/types.h>

#include <optional>

namespace anabranch::operators {

// What comes from outside, as the core takes it.

/// Of a layer's router: fp32, fp64 with fp64.
torch::Dtype gate_type(torch::Dtype dtype);

/// int64; InputError for what are no whole numbers.
at::Tensor ids_from(const at::Tensor& expert_ids);

/// A choice of experts [T, top_k], and what is padding, one bool a token.
RoutingConditions conditions_from(const std::optional<at::Tensor>& expert_ids,
                                  const std::optional<at::Tensor>& padding_mask);

}  // namespace anabranch::operators
