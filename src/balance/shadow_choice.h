#pragma once

#include <anabranch/expert_placement.h>
#include <torch/types.h>

#include <cstdint>
#include <vector>

namespace anabranch {

/// Seconds of what a training step is made of.
struct StepCosts {
  double assignment = 0;  ///< an expert's products of one row
  double row =
      0;  ///< of each rank whose link it takes: a row there and its result back, forward and backward
  double expert = 0;  ///< an expert's weights to all ranks, and its gradients back
};

/// What the ranks do in a step, as far as it depends on who computes what.
struct StepForecast {
  int64_t fullest_rank = 0;  ///< assignments that it computes
  double seconds = 0;  ///< of its products, of the fullest link's rows, of weights that travel
};

/// Experts that are shadowed in a step: their weights travel to all ranks, each of which computes its own tokens.
struct ShadowChoice {
  std::vector<int64_t> experts;  ///< by place
  StepForecast without;
  StepForecast with;
};

/// FasterMoE's choice (doi:10.1145/3503221.3508418): experts by falling load are shadowed as long as the step is
/// foreseen to become shorter; of all such beginnings the best. None where that gains less than 5 %.
/// `placement` of whole experts; `counts` [W, E] int64 on the host: assignments of each rank's tokens.
ShadowChoice choose_shadows(const torch::Tensor& counts, const ExpertPlacement& placement,
                            const StepCosts& costs);

}  // namespace anabranch
