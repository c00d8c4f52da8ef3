#pragma once

#include <anabranch/moe_layer.h>

#include <string_view>
#include <vector>

namespace anabranch::operators {

// Parameters, and the router's buffer, travel as a list: those that the options call for, the router's
// first, then the experts'.

struct NamedParameter {
  std::string_view name;   ///< as MoELayer names it: "experts.up_weight"
  torch::Tensor* tensor;   ///< its place in MoEParameters
  bool is_expert = false;  ///< spread over the ranks
};
std::vector<NamedParameter> named_parameters(MoEParameters& parameters, const MoEOptions& options);

/// How many of such a list are the router's: experts.up_weight is the first of three dimensions.
size_t num_router_tensors(at::TensorList list);

/// InputError unless the list has as many as the options call for. The router's may all be missing, where a routing
/// comes from outside.
MoEParameters parameters_from_list(at::TensorList list, const MoEOptions& options);

/// The parameters that MoELayer begins with, as a list.
std::vector<torch::Tensor> initial_parameters(const MoEOptions& options, int64_t rank,
                                              int64_t num_ranks);

}  // namespace anabranch::operators
