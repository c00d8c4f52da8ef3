#pragma once

#include <torch/types.h>

#include <tuple>
#include <vector>

namespace anabranch {

// Autograd and operators take lists of tensors. What stands where in one is said in one place, by a
// struct whose `tensors()` ties its members in the list's order.

/// The members of `named` as a list.
template <typename Struct>
std::vector<torch::Tensor> pack(Struct named) {
  return std::apply(
      [](auto&... members) { return std::vector<torch::Tensor>{std::move(members)...}; },
      named.tensors());
}

/// The struct that such a list was made of.
template <typename Struct>
Struct unpack(at::TensorList list) {
  Struct named;
  const auto members = named.tensors();
  constexpr size_t kMembers = std::tuple_size_v<decltype(named.tensors())>;
  TORCH_INTERNAL_ASSERT(list.size() == kMembers);
  size_t place = 0;
  std::apply([&](auto&... member) { ((member = list[place++]), ...); }, members);
  return named;
}

}  // namespace anabranch
