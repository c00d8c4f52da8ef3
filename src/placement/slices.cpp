#include "placement/slices.h"

#include <ATen/ops/stack.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/accumulate.h>

#include "communicator/chunks.h"

namespace anabranch {

int64_t slice_width(int64_t expert_hidden_size, const HeldExpert& held) {
  return chunk_length(expert_hidden_size, static_cast<int>(held.slice),
                      static_cast<int>(held.slices));
}

SliceCut cut_of(std::string_view parameter, bool glu, int64_t expert_hidden_size) {
  if (parameter == "up_weight" || parameter == "up_bias") {
    const int64_t parts = glu ? 2 : 1;
    return {0, parts, parts * expert_hidden_size};
  }
  return parameter == "down_weight" ? SliceCut{1, 1, expert_hidden_size} : SliceCut{};
}

torch::Tensor view_of_slice(const torch::Tensor& whole, const HeldExpert& held,
                            const SliceCut& cut) {
  if (cut.dimension < 0 || held.slices == 1) {
    return whole;
  }
  const int64_t length = cut.size / cut.parts;
  const auto slices = static_cast<int>(held.slices);
  const auto slice = static_cast<int>(held.slice);
  return whole.unflatten(cut.dimension, {cut.parts, length})
      .narrow(cut.dimension + 1, chunk_begin(length, slice, slices),
              chunk_length(length, slice, slices));
}

void copy_slice(const torch::Tensor& part, const torch::Tensor& whole, const HeldExpert& held,
                const SliceCut& cut) {
  if (cut.dimension < 0 && held.slice > 0) {
    part.zero_();
  } else {
    const auto slice = view_of_slice(whole, held, cut);
    part.view(slice.sizes()).copy_(slice);
  }
}

void copy_into_whole(const torch::Tensor& whole, const torch::Tensor& part, const HeldExpert& held,
                     const SliceCut& cut) {
  if (cut.dimension < 0 && held.slice > 0) {
    return;
  }
  const auto slice = view_of_slice(whole, held, cut);
  slice.copy_(part.view(slice.sizes()));
}

std::vector<int64_t> whole_sizes(at::IntArrayRef sizes, const SliceCut& cut) {
  auto whole = sizes.vec();
  if (cut.dimension >= 0) {
    whole[cut.dimension] = cut.size;
  }
  return whole;
}

int64_t first_number_of(const HeldExpert& held, at::IntArrayRef sizes, const SliceCut& cut) {
  const int64_t whole = c10::multiply_integers(whole_sizes(sizes, cut));
  if (cut.dimension < 0 || held.slices == 1) {
    return held.expert * whole;
  }
  const int64_t before = chunk_begin(cut.size / cut.parts, static_cast<int>(held.slice),
                                     static_cast<int>(held.slices));
  return held.expert * whole + before * cut.parts * (whole / cut.size);
}

ExpertProjections with_biases_once(ExpertProjections experts, const ExpertPlacement& placement,
                                   int64_t rank) {
  const int64_t local = placement.local_experts(rank);
  if (!experts.down.bias.defined() || placement.most_slices() == 1 || local == 0) {
    return experts;
  }
  std::vector<torch::Tensor> biases;
  for (int64_t i = 0; i < local; ++i) {
    const auto bias = experts.down.bias[i];
    biases.push_back(placement.at(rank, i).slice == 0 ? bias : torch::zeros_like(bias));
  }
  experts.down.bias = at::stack(biases);
  return experts;
}

}  // namespace anabranch
