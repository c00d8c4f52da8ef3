#pragma once

#include <anabranch/exchange.h>
#include <torch/types.h>

#include <string>
#include <vector>

namespace anabranch::operators {

// A plan travels as a list of tensors: what Exchange reads of an ExchangePlan, its counts as int64
// tensors in host memory. Python names them (PlanTensors in _plan.py).

/// The members of ExchangePlan that are in such a list, in its order.
std::vector<std::string> plan_fields();

/// Tensors that share no memory, as what an operator returns must not.
std::vector<torch::Tensor> pack_plan(const ExchangePlan& plan);
/// InputError unless it is one. `top_k` of 0: not known, and of no use to the caller.
ExchangePlan unpack_plan(at::TensorList list, int64_t top_k);

/// Counts, int64 [n] in host memory.
std::vector<int64_t> counts_from(const torch::Tensor& tensor);

}  // namespace anabranch::operators
