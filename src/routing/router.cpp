#include <anabranch/router.h>

#include <limits>

#include "routing/gate.h"
#include "support/check.h"
#include "support/initialize.h"
#include "support/stage.h"

namespace anabranch {
namespace {

/// fp32, or fp64 where the layer computes in fp64.
torch::Dtype gate_type(torch::Dtype dtype) {
  return dtype == torch::kFloat64 ? torch::kFloat64 : torch::kFloat32;
}

}  // namespace

RouterImpl::RouterImpl(const MoEOptions& options) : options_(options) {
  weight = register_parameter(
      "weight", torch::empty({options.num_experts, options.hidden_size},
                             torch::dtype(gate_type(options.dtype)).device(options.device)));
  constexpr uint64_t kStream = std::numeric_limits<uint64_t>::max();  // apart from the experts'
  fill_uniform(weight, options.hidden_size, options.seed, kStream);
}

Routing RouterImpl::forward(const torch::Tensor& x) {
  return route_tokens(x, weight, options_, is_training());
}

Routing route_tokens(const torch::Tensor& x, const torch::Tensor& weight, const MoEOptions& options,
                     bool training) {
  const Stage named("anabranch.route");
  check_input(x.defined(), "router: x is undefined");
  check_input(x.dim() == 2 && x.size(1) == weight.size(1), "router: x is ", x.sizes(),
              ", expected [T, ", weight.size(1), "]");
  check_input(x.is_floating_point() && x.device() == weight.device(), "router: x is ",
              x.scalar_type(), " on ", x.device(), ", expected a floating type on ",
              weight.device());
  torch::Tensor gate_input = x;
  if (training && options.jitter > 0) {
    gate_input = x.to(weight.scalar_type());
    gate_input =
        gate_input * torch::empty_like(gate_input).uniform_(1 - options.jitter, 1 + options.jitter);
  }
  return route(gate_logits(gate_input, weight), options.top_k, options.renormalize);
}

}  // namespace anabranch
