#include "moe_options.h"

#include <array>
#include <charconv>
#include <cmath>
#include <concepts>

#include "balance/balancer.h"
#include "communicator/agreement.h"
#include "option_fields.h"
#include "overlap_choice.h"
#include "routing/rule.h"
#include "support/check.h"

namespace anabranch {
namespace {

void check_positive(int64_t value, const char* name) {
  check_input(value >= 1, "MoEOptions: ", name, " = ", value, ", expected at least 1");
}

/// The largest parameter must be addressable: experts × out × in × 8 bytes within int64.
void check_addressable(int64_t experts, int64_t inner, int64_t hidden) {
  int64_t bytes = 0;
  check_input(!__builtin_mul_overflow(experts, inner, &bytes) &&
                  !__builtin_mul_overflow(bytes, hidden, &bytes) &&
                  !__builtin_mul_overflow(bytes, int64_t{2 * 8}, &bytes),
              "MoEOptions: ", experts, " experts of ", inner, " × ", hidden,
              " overflow 64-bit sizes");
}

/// A weight that is always 1 teaches the router nothing.
void check_router_learns(const MoEOptions& options) {
  check_input(
      options.top_k > 1 || options.num_experts == 1 || !options.renormalize,
      "MoEOptions: top_k = 1 with renormalize gives every token the weight 1 and the router no "
      "gradient, expected renormalize = false (as in Switch Transformer) or top_k of 2 or more");
}

void check_activation(const MoEOptions& options) {
  check_input(std::isfinite(options.activation_limit) && options.activation_limit >= 0,
              "MoEOptions: activation_limit = ", options.activation_limit,
              ", expected 0 (none) or a number above it");
  check_input(std::isfinite(options.glu_offset), "MoEOptions: glu_offset = ", options.glu_offset,
              ", expected a number");
  check_input(options.glu || options.glu_offset == 0,
              "MoEOptions: glu_offset = ", options.glu_offset, " without glu");
}

void check_losses(const MoEOptions& options) {
  for (const auto& [name, value] :
       {std::pair{"balance_coefficient", options.balance_coefficient},
        std::pair{"sequence_balance_coefficient", options.sequence_balance_coefficient},
        std::pair{"global_balance_coefficient", options.global_balance_coefficient},
        std::pair{"z_coefficient", options.z_coefficient}}) {
    check_input(std::isfinite(value) && value >= 0, "MoEOptions: ", name, " = ", value,
                ", expected 0 (not wanted) or a number above it");
  }
  check_input(!options.attach_losses || options.balance_coefficient > 0 ||
                  options.sequence_balance_coefficient > 0 ||
                  options.global_balance_coefficient > 0 || options.z_coefficient > 0,
              "MoEOptions: attach_losses without a loss's coefficient");
}

void check_cross_node_limit(const MoEOptions& options) {
  check_input(options.cross_node_limit >= 0 && options.cross_node_limit <= 1,
              "MoEOptions: cross_node_limit = ", options.cross_node_limit,
              ", expected 0 (none) or a share up to 1");
  check_input(
      options.cross_node_limit == 0 || (options.gate == Gate::kTopK && options.expert_groups == 1 &&
                                        options.forced_routing == ForcedRouting::kNone),
      "MoEOptions: cross_node_limit takes gate top_k, one group of experts and no "
      "forced_routing");
}

/// Gates of their own rules go with no others.
void check_gate(const MoEOptions& options) {
  if (options.gate == Gate::kTopK) {
    return;
  }
  const char* name = name_of(options.gate);
  check_input(options.expert_groups == 1 && !options.expert_bias &&
                  options.forced_routing == ForcedRouting::kNone,
              "MoEOptions: gate ", name,
              " takes one group of experts, no expert_bias and no forced_routing");
  check_input(options.router_score == RouterScore::kSoftmax || options.gate == Gate::kSinkhorn ||
                  options.gate == Gate::kExpertChoice,
              "MoEOptions: gate ", name, " takes softmax scores");
  check_input(options.gate != Gate::kGShard || (options.top_k == 2 && options.renormalize),
              "MoEOptions: gate gshard with top_k = ", options.top_k,
              options.renormalize ? "" : " and without renormalize",
              ", expected top_k = 2 and renormalize");
  check_input(options.gate != Gate::kExpertChoice || options.receive_capacity == 0,
              "MoEOptions: gate expert_choice with receive_capacity, which is of tokens that have "
              "top_k experts");
}

void check_bias_update(const MoEOptions& options) {
  check_input(options.expert_bias_update == BiasUpdate::kSign ||
                  (options.expert_bias && options.expert_groups == 1 &&
                   options.router_score != RouterScore::kSqrtSoftplus),
              "MoEOptions: expert_bias_update quantile takes expert_bias, one group of experts and "
              "softmax or sigmoid scores, which end at 1");
}

}  // namespace

const MoEOptions& checked(const MoEOptions& options) {
  check_positive(options.hidden_size, "hidden_size");
  check_positive(options.expert_hidden_size, "expert_hidden_size");
  check_positive(options.num_experts, "num_experts");
  check_rule(routing_rule(options), options.num_experts, "MoEOptions");
  check_gate(options);
  check_bias_update(options);
  check_cross_node_limit(options);
  check_router_learns(options);
  check_activation(options);
  check_losses(options);
  check_input(options.latent_size >= 0, "MoEOptions: latent_size = ", options.latent_size,
              ", expected 0 (none) or more");
  check_input(options.shared_expert_hidden_size >= 0,
              "MoEOptions: shared_expert_hidden_size = ", options.shared_expert_hidden_size,
              ", expected 0 (none) or more");
  check_input(!options.shared_expert_gate || options.shared_expert_hidden_size > 0,
              "MoEOptions: shared_expert_gate without a shared expert, expected "
              "shared_expert_hidden_size of at least 1");
  check_input(options.jitter >= 0 && options.jitter < 1, "MoEOptions: jitter = ", options.jitter,
              ", expected 0 ≤ jitter < 1");
  check_input(std::isfinite(options.receive_capacity) && options.receive_capacity >= 0,
              "MoEOptions: receive_capacity = ", options.receive_capacity, ", expected 0 or more");
  check_input(options.receive_capacity == 0 || options.errors == Errors::kLate,
              "MoEOptions: receive_capacity with errors = at_call, for which the host waits");
  check_input(options.dtype == torch::kFloat32 || options.dtype == torch::kFloat64 ||
                  options.dtype == torch::kBFloat16 || options.dtype == torch::kFloat16,
              "MoEOptions: dtype = ", options.dtype, ", expected fp32, fp64, bf16 or fp16");
  OverlapChoice{options};  // refuses what names none
  balance_of(options);
  check_input(options.receive_rows_limit >= 0,
              "MoEOptions: receive_rows_limit = ", options.receive_rows_limit,
              ", expected 0 (none) or more");
  check_input(options.receive_capacity == 0 ||
                  (options.receive_rows_limit == 0 && options.balance == "off"),
              "MoEOptions: receive_capacity with ",
              options.balance == "off" ? "receive_rows_limit" : "balance",
              ", for which the host would have to know the counts");
  check_addressable(options.num_experts, options.expert_hidden_size, options.hidden_size);
  check_addressable(1, options.shared_expert_hidden_size, options.hidden_size);
  return options;
}

namespace {

/// Equal for equal values alone.
template <typename T>
std::string text_of(const T& value) {
  if constexpr (NamedEnum<T>) {
    const char* name = name_of(value);
    return name != nullptr ? name : c10::str(static_cast<int>(value));
  } else if constexpr (std::floating_point<T>) {
    std::array<char, 32> digits;  // the shortest that give the value back are 24 at most
    return {digits.data(), std::to_chars(digits.begin(), digits.end(), value).ptr};
  } else if constexpr (std::same_as<T, torch::Device>) {
    return c10::DeviceTypeName(value.type(), /*lower_case=*/true);  // each rank has its own number
  } else {
    return c10::str(value);
  }
}

std::vector<std::pair<std::string, std::string>> fields(const MoEOptions& options) {
  std::vector<std::pair<std::string, std::string>> all;
  for_each_field(options, [&](const char* name, const auto& value) {
    all.emplace_back(name, text_of(value));
  });
  return all;
}

}  // namespace

ExpertPlacement placement_of(const MoEOptions& options, int64_t num_ranks) {
  auto placement = ExpertPlacement::parse(options.placement, options.num_experts, num_ranks);
  check_slices(placement, options.expert_hidden_size);
  check_input(placement.most_slices() == 1 || options.balance == "off", "MoEOptions: balance = '",
              options.balance, "' of experts in slices, expected off");
  gathered_ranks(options, num_ranks);
  return placement;
}

std::shared_ptr<Communicator> agree_on_options(const MoEOptions& options,
                                               std::shared_ptr<Communicator> communicator) {
  placement_of(checked(options), communicator->size());
  check_agreement(*communicator, fields(options));
  return communicator;
}

void check_receive_rows_limit(const MoEOptions& options, int64_t ranks) {
  check_input(options.receive_rows_limit == 0 || options.receive_rows_limit >= ranks,
              "MoEOptions: receive_rows_limit = ", options.receive_rows_limit, " with ", ranks,
              " ranks, expected 0 (none) or at least a row from each");
}

torch::Tensor layer_tokens(const torch::Tensor& x, const MoEOptions& options) {
  check_input(x.defined(), "MoELayer: input is undefined");
  check_input(x.dim() >= 1 && x.size(-1) == options.hidden_size, "MoELayer: input is ", x.sizes(),
              ", expected a last dimension of hidden_size = ", options.hidden_size);
  check_input(x.scalar_type() == options.dtype, "MoELayer: input is ", x.scalar_type(),
              ", expected ", options.dtype);
  check_input(x.device().type() == options.device.type() &&
                  (!options.device.has_index() || x.device() == options.device),
              "MoELayer: input is on ", x.device(), ", expected ", options.device);
  return (x.dim() == 2 ? x : x.reshape({-1, options.hidden_size})).contiguous();
}

void check_layer_routing(const Routing& routing, int64_t tokens, const MoEOptions& options) {
  check_input(routing.expert_ids.defined() && routing.weights.defined(),
              "MoELayer: routing must give expert_ids and weights");
  const bool by_experts = options.gate == Gate::kExpertChoice;
  check_input(routing.expert_ids.dim() == 2 && routing.expert_ids.size(0) == tokens &&
                  (routing.expert_ids.size(1) == options.top_k ||
                   (by_experts && routing.expert_ids.size(1) == options.num_experts)),
              "MoELayer: routing.expert_ids is ", routing.expert_ids.sizes(), ", expected [",
              tokens, ", ", options.top_k, "]");
  const auto weight_type = options.dtype == torch::kFloat64 ? torch::kFloat64 : torch::kFloat32;
  check_input(routing.weights.scalar_type() == weight_type, "MoELayer: routing.weights are ",
              routing.weights.scalar_type(), ", expected ", weight_type);
  check_input(routing.expert_ids.device().type() == options.device.type(),
              "MoELayer: routing is on ", routing.expert_ids.device(), ", expected ",
              options.device);
}

}  // namespace anabranch
