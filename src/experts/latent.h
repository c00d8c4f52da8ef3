#pragma once

#include <anabranch/options.h>
#include <torch/types.h>

namespace anabranch {

/// Around the exchange: tokens [T, h] · downᵀ go to the experts, what comes back · upᵀ is the output.
struct LatentProjections {
  torch::Tensor down;  ///< [latent_size, h]
  torch::Tensor up;    ///< [h, latent_size]
};

LatentProjections make_latent_projections(const MoEOptions& options);

}  // namespace anabranch
