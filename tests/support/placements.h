#pragma once

#include <anabranch/expert_placement.h>
#include <torch/types.h>

#include <string>

#include "support/random.h"

namespace anabranch::test {

/// Experts of hidden size `hidden` anywhere: in any order and number on each rank, whole or all in slices.
ExpertPlacement random_placement(Random& random, int64_t num_experts, int64_t num_ranks,
                                 int64_t hidden);

/// Of a parameter of all experts, [E, ..], what `rank` holds, [local, ..]. `name` ends as the parameters of Experts
/// are called; `hidden`: of a whole expert.
torch::Tensor part_of(const torch::Tensor& whole, const std::string& name,
                      const ExpertPlacement& placement, int64_t rank, int64_t hidden, bool glu);
/// And back, into `whole`, which it is added to.
void add_part(torch::Tensor& whole, const torch::Tensor& part, const std::string& name,
              const ExpertPlacement& placement, int64_t rank, int64_t hidden, bool glu);

}  // namespace anabranch::test
