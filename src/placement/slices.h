#pragma once

#include <anabranch/experts.h>

#include <string_view>
#include <vector>

namespace anabranch {

/// The hidden size of a slice.
int64_t slice_width(int64_t expert_hidden_size, const HeldExpert& held);

/// How slices cut the parameter of that name: "up_weight", "down_weight", "up_bias" or "down_bias".
SliceCut cut_of(std::string_view parameter, bool glu, int64_t expert_hidden_size);

/// Of a parameter of one whole expert what `held` has, [parts, slice, ..] or as it is where nothing is cut; a view.
torch::Tensor view_of_slice(const torch::Tensor& whole, const HeldExpert& held,
                            const SliceCut& cut);

/// Into `part`, a parameter of what `held` has, its numbers of the whole expert's.
void copy_slice(const torch::Tensor& part, const torch::Tensor& whole, const HeldExpert& held,
                const SliceCut& cut);
/// And back.
void copy_into_whole(const torch::Tensor& whole, const torch::Tensor& part, const HeldExpert& held,
                     const SliceCut& cut);

/// `sizes` of a part of an expert's parameter → those of the whole expert's.
std::vector<int64_t> whole_sizes(at::IntArrayRef sizes, const SliceCut& cut);

/// The number of the first element of a part of those `sizes`, where whole experts are numbered one after another
/// and the slices of each as well.
int64_t first_number_of(const HeldExpert& held, at::IntArrayRef sizes, const SliceCut& cut);

/// `experts` of `rank` with the down-projection's biases of first slices alone, each of which adds its expert's: the
/// others' values and gradients are 0. As they are where no expert is in slices. No wait for the device.
ExpertProjections with_biases_once(ExpertProjections experts, const ExpertPlacement& placement,
                                   int64_t rank);

}  // namespace anabranch
