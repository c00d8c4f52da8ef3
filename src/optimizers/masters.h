#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <string>

namespace anabranch {

/// What an optimizer updates: an fp32 copy of a parameter of 16 bits, any other itself.
inline torch::Tensor master_of(const torch::Tensor& parameter) {
  const auto values = parameter.detach();
  return at::isReducedFloatingType(values.scalar_type()) ? values.to(at::kFloat) : values;
}

/// The parameter, if it has a master beside it.
inline torch::Tensor rounded_of(const torch::Tensor& parameter) {
  return at::isReducedFloatingType(parameter.scalar_type()) ? parameter.detach() : torch::Tensor();
}

/// FNV-1a: the same on every machine.
inline uint64_t hash_of(const std::string& name) {
  uint64_t hash = 0xcbf29ce484222325ULL;
  for (const unsigned char byte : name) hash = (hash ^ byte) * 0x100000001b3ULL;
  return hash;
}

}  // namespace anabranch
