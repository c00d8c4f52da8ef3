// Gradients of the ranks, finished and clipped. Parameters are Python's.

#include <anabranch/gradients.h>
#include <torch/library.h>

#include "registry.h"

namespace anabranch::operators {
namespace {

at::Tensor finish(at::TensorList experts, at::TensorList replicated, std::string world,
                  std::string expert_replicas) {
  return finish_gradients({experts.vec(), replicated.vec()}, *group_named(world),
                          *group_named(expert_replicas));
}

double clip(at::TensorList experts, at::TensorList replicated, std::string world,
            int64_t expert_parallel_size, double max_norm, double loss_scale) {
  return clip_gradient_norm({experts.vec(), replicated.vec()}, max_norm, *group_named(world),
                            expert_parallel_size, loss_scale);
}

bool all_finished(at::TensorList gradients) {
  return std::all_of(gradients.begin(), gradients.end(), is_finished);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(anabranch, library) {
  library.def(
      "finish_gradients(Tensor(a!)[] experts, Tensor(b!)[] replicated, str world, "
      "str expert_replicas) -> Tensor",
      finish);
  library.def(
      "clip_gradient_norm(Tensor(a!)[] experts, Tensor(b!)[] replicated, str world, "
      "int expert_parallel_size, float max_norm, float loss_scale) -> float",
      clip);
  library.def("gradients_are_finished(Tensor[] gradients) -> bool", all_finished);
}

}  // namespace anabranch::operators
