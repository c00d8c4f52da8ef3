#include "given.h"

#include "support/check.h"

namespace anabranch::operators {

torch::Dtype gate_type(torch::Dtype dtype) {
  return dtype == torch::kFloat64 ? torch::kFloat64 : torch::kFloat32;
}

at::Tensor ids_from(const at::Tensor& expert_ids) {
  check_input(at::isIntegralType(expert_ids.scalar_type(), /*includeBool=*/false),
              "routing: expert_ids are ", expert_ids.scalar_type(), ", expected integers");
  return expert_ids.to(torch::kInt64);
}

RoutingConditions conditions_from(const std::optional<at::Tensor>& expert_ids,
                                  const std::optional<at::Tensor>& padding_mask) {
  RoutingConditions conditions;
  if (expert_ids.has_value()) {
    conditions.expert_ids = ids_from(*expert_ids);
  }
  if (padding_mask.has_value()) {
    check_input(padding_mask->scalar_type() == torch::kBool, "padding_mask is ",
                padding_mask->scalar_type(), ", expected bool");
    conditions.padding_mask = padding_mask->reshape({-1});
  }
  return conditions;
}

}  // namespace anabranch::operators
