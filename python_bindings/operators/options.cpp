#include "options.h"

#include <concepts>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>

#include "support/check.h"

namespace anabranch::operators {
namespace {

using Json = nlohmann::json;

Activation activation_named(const std::string& name) {
  static const std::map<std::string, Activation> activations = {
      {"gelu_tanh", Activation::kGeluTanh},
      {"gelu", Activation::kGelu},
      {"relu", Activation::kRelu},
      {"silu", Activation::kSilu}};
  const auto found = activations.find(name);
  check_input(found != activations.end(), "is unknown, expected gelu_tanh, gelu, relu or silu");
  return found->second;
}

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

const std::map<std::string, Setter>& setters() {
  static const std::map<std::string, Setter> all = {
      {"hidden_size", set(&MoEOptions::hidden_size)},
      {"expert_hidden_size", set(&MoEOptions::expert_hidden_size)},
      {"num_experts", set(&MoEOptions::num_experts)},
      {"top_k", set(&MoEOptions::top_k)},
      {"activation",
       [](MoEOptions& options, const Json& value) {
         options.activation = activation_named(get<std::string>(value));
       }},
      {"glu", set(&MoEOptions::glu)},
      {"bias", set(&MoEOptions::bias)},
      {"shared_expert_hidden_size", set(&MoEOptions::shared_expert_hidden_size)},
      {"renormalize", set(&MoEOptions::renormalize)},
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
