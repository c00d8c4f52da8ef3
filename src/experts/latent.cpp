#include "experts/latent.h"

#include <ATen/ops/empty.h>

#include <limits>

#include "support/initialize.h"

namespace anabranch {

LatentProjections make_latent_projections(const MoEOptions& options) {
  const auto of_layer = torch::dtype(options.dtype).device(options.device);
  constexpr uint64_t kDownStream =
      std::numeric_limits<uint64_t>::max() - 1;  // apart from the experts'
  constexpr uint64_t kUpStream = kDownStream - 1;
  LatentProjections latent{at::empty({options.latent_size, options.hidden_size}, of_layer),
                           at::empty({options.hidden_size, options.latent_size}, of_layer)};
  fill_uniform(latent.down, options.hidden_size, options.seed, kDownStream);
  fill_uniform(latent.up, options.latent_size, options.seed, kUpStream);
  return latent;
}

}  // namespace anabranch
