#pragma once

#include <anabranch/options.h>

#include <array>
#include <cstddef>
#include <tuple>
#include <type_traits>
#include <utility>

// The one list of what MoEOptions is made of, with the names that files, messages and other languages
// use. A member that is not listed does not compile.

namespace anabranch {

template <typename T>
struct OptionField {
  const char* name;
  T MoEOptions::*member;
};
template <typename T>
OptionField(const char*, T MoEOptions::*) -> OptionField<T>;  // clang 16 and older ask for it

inline constexpr std::tuple kOptionFields = {
    OptionField{"hidden_size", &MoEOptions::hidden_size},
    OptionField{"expert_hidden_size", &MoEOptions::expert_hidden_size},
    OptionField{"num_experts", &MoEOptions::num_experts},
    OptionField{"top_k", &MoEOptions::top_k},
    OptionField{"activation", &MoEOptions::activation},
    OptionField{"glu", &MoEOptions::glu},
    OptionField{"activation_limit", &MoEOptions::activation_limit},
    OptionField{"glu_offset", &MoEOptions::glu_offset},
    OptionField{"bias", &MoEOptions::bias},
    OptionField{"shared_expert_hidden_size", &MoEOptions::shared_expert_hidden_size},
    OptionField{"shared_expert_gate", &MoEOptions::shared_expert_gate},
    OptionField{"latent_size", &MoEOptions::latent_size},
    OptionField{"gate", &MoEOptions::gate},
    OptionField{"router_score", &MoEOptions::router_score},
    OptionField{"renormalize", &MoEOptions::renormalize},
    OptionField{"routing_scale", &MoEOptions::routing_scale},
    OptionField{"expert_bias", &MoEOptions::expert_bias},
    OptionField{"expert_bias_update", &MoEOptions::expert_bias_update},
    OptionField{"expert_groups", &MoEOptions::expert_groups},
    OptionField{"top_groups", &MoEOptions::top_groups},
    OptionField{"group_score", &MoEOptions::group_score},
    OptionField{"forced_routing", &MoEOptions::forced_routing},
    OptionField{"router_fp64", &MoEOptions::router_fp64},
    OptionField{"jitter", &MoEOptions::jitter},
    OptionField{"cross_node_limit", &MoEOptions::cross_node_limit},
    OptionField{"balance_coefficient", &MoEOptions::balance_coefficient},
    OptionField{"sequence_balance_coefficient", &MoEOptions::sequence_balance_coefficient},
    OptionField{"global_balance_coefficient", &MoEOptions::global_balance_coefficient},
    OptionField{"z_coefficient", &MoEOptions::z_coefficient},
    OptionField{"attach_losses", &MoEOptions::attach_losses},
    OptionField{"recompute", &MoEOptions::recompute},
    OptionField{"engine", &MoEOptions::engine},
    OptionField{"errors", &MoEOptions::errors},
    OptionField{"overlap", &MoEOptions::overlap},
    OptionField{"receive_capacity", &MoEOptions::receive_capacity},
    OptionField{"receive_rows_limit", &MoEOptions::receive_rows_limit},
    OptionField{"balance", &MoEOptions::balance},
    OptionField{"placement", &MoEOptions::placement},
    OptionField{"dtype", &MoEOptions::dtype},
    OptionField{"device", &MoEOptions::device},
    OptionField{"seed", &MoEOptions::seed},
};

/// Calls `visit(name, member)` for every member of `options`, in their order.
template <typename Options, typename Visit>
void for_each_field(Options&& options, const Visit& visit) {
  std::apply([&](const auto&... field) { (visit(field.name, options.*field.member), ...); },
             kOptionFields);
}

template <typename T>
using EnumNames = std::pair<const char*, T>;

// The names of an enumeration's values, by a value of its type.
constexpr auto names_of(Activation) {
  return std::array{EnumNames<Activation>{"gelu_tanh", Activation::kGeluTanh},
                    EnumNames<Activation>{"gelu", Activation::kGelu},
                    EnumNames<Activation>{"relu", Activation::kRelu},
                    EnumNames<Activation>{"silu", Activation::kSilu},
                    EnumNames<Activation>{"relu_squared", Activation::kReluSquared},
                    EnumNames<Activation>{"quick_gelu", Activation::kQuickGelu}};
}
constexpr auto names_of(Gate) {
  return std::array{
      EnumNames<Gate>{"top_k", Gate::kTopK}, EnumNames<Gate>{"noisy_top_k", Gate::kNoisyTopK},
      EnumNames<Gate>{"gshard", Gate::kGShard}, EnumNames<Gate>{"sinkhorn", Gate::kSinkhorn},
      EnumNames<Gate>{"expert_choice", Gate::kExpertChoice}};
}
constexpr auto names_of(RouterScore) {
  return std::array{EnumNames<RouterScore>{"softmax", RouterScore::kSoftmax},
                    EnumNames<RouterScore>{"sigmoid", RouterScore::kSigmoid},
                    EnumNames<RouterScore>{"sqrt_softplus", RouterScore::kSqrtSoftplus}};
}
constexpr auto names_of(BiasUpdate) {
  return std::array{EnumNames<BiasUpdate>{"sign", BiasUpdate::kSign},
                    EnumNames<BiasUpdate>{"quantile", BiasUpdate::kQuantile}};
}
constexpr auto names_of(GroupScore) {
  return std::array{EnumNames<GroupScore>{"top_two_sum", GroupScore::kTopTwoSum},
                    EnumNames<GroupScore>{"maximum", GroupScore::kMaximum},
                    EnumNames<GroupScore>{"top_share_sum", GroupScore::kTopShareSum},
                    EnumNames<GroupScore>{"top_share_logit_sum", GroupScore::kTopShareLogitSum}};
}
constexpr auto names_of(ForcedRouting) {
  return std::array{EnumNames<ForcedRouting>{"none", ForcedRouting::kNone},
                    EnumNames<ForcedRouting>{"balanced", ForcedRouting::kBalanced},
                    EnumNames<ForcedRouting>{"random", ForcedRouting::kRandom}};
}

constexpr auto names_of(Errors) {
  return std::array{EnumNames<Errors>{"late", Errors::kLate},
                    EnumNames<Errors>{"at_call", Errors::kAtCall}};
}

/// The types that have such names.
template <typename T>
concept NamedEnum = std::is_enum_v<T> && requires(T value) {
  names_of(value);
};

/// What `value` is called; null if it is none of them.
template <NamedEnum T>
constexpr const char* name_of(T value) {
  for (const auto& [name, known] : names_of(value)) {
    if (known == value) return name;
  }
  return nullptr;
}

namespace internal {

/// Takes the place of any member in an initialiser.
struct AnyMember {
  template <typename T>
  operator T() const;  // NOLINT(google-explicit-constructor)
};

/// How many members an initialiser of `Aggregate` can name.
template <typename Aggregate, typename... Members>
constexpr size_t count_members() {
  if constexpr (requires { Aggregate{Members{}..., AnyMember{}}; }) {
    return count_members<Aggregate, Members..., AnyMember>();
  } else {
    return sizeof...(Members);
  }
}

}  // namespace internal

static_assert(std::tuple_size_v<decltype(kOptionFields)> == internal::count_members<MoEOptions>(),
              "kOptionFields must list every member of MoEOptions");

}  // namespace anabranch
