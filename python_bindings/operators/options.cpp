#include "options.h"

#include <concepts>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>

#include "support/check.h"

namespace anabranch::operators {
namespace {

using Json = nlohmann::json;

using Setter = std::function<void(MoEOptions&, const Json&)>;

/// JSON's own conversions would take 1.5 for 1, and true for 1.
template <typename T>
bool is_a(const Json& value) {
  if constexpr (std::same_as<T, bool>) {
    return value.is_boolean();
  } else if constexpr (std::same_as<T, std::string>) {
    return value.is_string();
  } else if constexpr (std::floating_point<T>) {
    return value.is_number();
  } else {
    return std::signed_integral<T> ? value.is_number_integer() : value.is_number_unsigned();
  }
}

template <typename T>
T get(const Json& value) {
  check_input(is_a<T>(value), "is of the wrong type");
  return value.get<T>();
}

template <typename T>
Setter set(T MoEOptions::*member) {
  return [member](MoEOptions& options, const Json& value) { options.*member = get<T>(value); };
}

/// The value of one of these names.
template <typename T>
Setter set(T MoEOptions::*member, std::vector<std::pair<std::string, T>> values) {
  return [member, values = std::move(values)](MoEOptions& options, const Json& value) {
    const auto name = get<std::string>(value);
    std::vector<std::string> names;
    for (const auto& [known, meaning] : values) {
      if (name == known) {
        options.*member = meaning;
        return;
      }
      names.push_back(known);
    }
    throw InputError(c10::str("is unknown, expected one of ", c10::Join(", ", names)));
  };
}

const std::map<std::string, Setter>& setters() {
  static const std::map<std::string, Setter> all = {
      {"hidden_size", set(&MoEOptions::hidden_size)},
      {"expert_hidden_size", set(&MoEOptions::expert_hidden_size)},
      {"num_experts", set(&MoEOptions::num_experts)},
      {"top_k", set(&MoEOptions::top_k)},
      {"activation", set(&MoEOptions::activation, {{"gelu_tanh", Activation::kGeluTanh},
                                                   {"gelu", Activation::kGelu},
                                                   {"relu", Activation::kRelu},
                                                   {"silu", Activation::kSilu}})},
      {"glu", set(&MoEOptions::glu)},
      {"bias", set(&MoEOptions::bias)},
      {"shared_expert_hidden_size", set(&MoEOptions::shared_expert_hidden_size)},
      {"shared_expert_gate", set(&MoEOptions::shared_expert_gate)},
      {"gate",
       set(&MoEOptions::gate,
           {{"top_k", Gate::kTopK}, {"noisy_top_k", Gate::kNoisyTopK}, {"gshard", Gate::kGShard}})},
      {"router_score", set(&MoEOptions::router_score, {{"softmax", RouterScore::kSoftmax},
                                                       {"sigmoid", RouterScore::kSigmoid}})},
      {"renormalize", set(&MoEOptions::renormalize)},
      {"routing_scale", set(&MoEOptions::routing_scale)},
      {"expert_bias", set(&MoEOptions::expert_bias)},
      {"expert_groups", set(&MoEOptions::expert_groups)},
      {"top_groups", set(&MoEOptions::top_groups)},
      {"group_score", set(&MoEOptions::group_score, {{"top_two_sum", GroupScore::kTopTwoSum},
                                                     {"maximum", GroupScore::kMaximum}})},
      {"jitter", set(&MoEOptions::jitter)},
      {"recompute", set(&MoEOptions::recompute)},
      {"engine", set(&MoEOptions::engine)},
      {"seed", set(&MoEOptions::seed)}};
  return all;
}

}  // namespace

MoEOptions options_from_json(const std::string& json) {
  const auto object = Json::parse(json, /*callback=*/nullptr, /*allow_exceptions=*/false);
  check_input(object.is_object(), "options: expected a JSON object, got '", json, "'");
  MoEOptions options;
  for (const auto& [name, value] : object.items()) {
    const auto setter = setters().find(name);
    check_input(setter != setters().end(), "options: there is no option '", name, "'");
    try {
      setter->second(options, value);
    } catch (const std::exception& error) {
      throw InputError(c10::str("options: ", name, " = ", value.dump(), " ", error.what()));
    }
  }
  return options;
}

}  // namespace anabranch::operators
