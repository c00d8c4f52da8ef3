#include "options.h"

#include <concepts>
#include <limits>
#include <nlohmann/json.hpp>
#include <type_traits>

#include "option_fields.h"
#include "support/check.h"
#include "support/json.h"

namespace anabranch::operators {
namespace {

using Json = nlohmann::json;

/// So many bytes of what is no JSON are shown.
constexpr size_t kShown = 200;

/// A tensor's type and device come with the tensors.
template <typename T>
constexpr bool kInJson = !std::same_as<T, torch::Dtype> && !std::same_as<T, torch::Device>;

/// JSON's own conversions would take 1.5 for 1, true for 1, and 2^63 for −2^63.
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
  if constexpr (std::signed_integral<T>) {
    check_input(!value.is_number_unsigned() ||
                    value.get<uint64_t>() <= static_cast<uint64_t>(std::numeric_limits<T>::max()),
                "is more than 64 bits hold");
  }
  return value.get<T>();
}

/// The value of one of its names.
template <NamedEnum T>
T get(const Json& value) {
  const auto text = get<std::string>(value);
  std::vector<std::string> names;
  for (const auto& [name, meaning] : names_of(T())) {
    if (text == name) return meaning;
    names.push_back(name);
  }
  throw InputError(c10::str("is unknown, expected one of ", c10::Join(", ", names)));
}

/// Sets the member of that name; false if there is none.
bool set(MoEOptions& options, const std::string& name, const Json& value) {
  bool found = false;
  for_each_field(options, [&](const char* field, auto& member) {
    using T = std::remove_reference_t<decltype(member)>;
    if constexpr (kInJson<T>) {
      if (name == field) {
        member = get<T>(value);
        found = true;
      }
    }
  });
  return found;
}

}  // namespace

MoEOptions options_from_json(const std::string& json) {
  Json object;
  try {
    object = parse_json(json);
    check_input(object.is_object(), "no object");
  } catch (const std::exception& error) {
    const auto text =
        Json(json).dump(-1, ' ', /*ensure_ascii=*/true, Json::error_handler_t::replace);
    throw InputError(c10::str("options: expected a JSON object, got ", text.substr(0, kShown), ": ",
                              error.what()));
  }
  MoEOptions options;
  for (const auto& [name, value] : object.items()) {
    bool found = false;
    try {
      found = set(options, name, value);
    } catch (const std::exception& error) {
      throw InputError(c10::str("options: ", name, " = ", value.dump(), " ", error.what()));
    }
    check_input(found, "options: there is no option '", name, "'");
  }
  return options;
}

std::string default_options() {
  Json object;
  for_each_field(MoEOptions(), [&](const char* name, const auto& value) {
    using T = std::remove_cvref_t<decltype(value)>;
    if constexpr (NamedEnum<T>) {
      object[name] = name_of(value);
    } else if constexpr (kInJson<T>) {
      object[name] = value;
    } else {
      object[name] = nullptr;
    }
  });
  return object.dump();
}

}  // namespace anabranch::operators
