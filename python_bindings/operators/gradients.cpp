// Gradients of the ranks, finished and clipped. Parameters are Python's.

#include <anabranch/gradient_reducer.h>
#include <anabranch/gradients.h>
#include <torch/custom_class.h>

#include "operators.h"
#include "registry.h"

namespace anabranch::operators {
namespace {

at::Tensor finish(at::TensorList experts, at::TensorList replicated, at::TensorList beside,
                  std::string world, std::string expert_replicas, int64_t bucket_bytes) {
  return finish_gradients({experts.vec(), replicated.vec(), beside.vec()}, *group_named(world),
                          *group_named(expert_replicas), bucket_bytes);
}

/// Of parameters by name, which are Python's.
struct Reducer : torch::CustomClassHolder {
  using Named = c10::Dict<std::string, at::Tensor>;
  Reducer(const Named& experts, const Named& replicated, const std::string& world,
          const std::string& expert_replicas, int64_t bucket_bytes)
      : reducer(listed(experts, replicated), *group_named(world), *group_named(expert_replicas),
                bucket_bytes) {}

  static std::vector<ParallelParameter> listed(const Named& experts, const Named& replicated) {
    std::vector<ParallelParameter> parameters;
    for (const auto* kind : {&experts, &replicated}) {
      for (const auto& entry : *kind) {
        parameters.push_back(
            {.name = entry.key(), .tensor = entry.value(), .is_expert = kind == &experts});
      }
    }
    return parameters;
  }

  void start() { reducer.start(); }
  at::Tensor finish(const std::vector<at::Tensor>& beside) { return reducer.finish(beside); }
  int64_t summed() { return reducer.summed(); }

  GradientReducer reducer;
};

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
  Operators operators(library);
  operators.def(
      "finish_gradients(Tensor(a!)[] experts, Tensor(b!)[] replicated, Tensor(c!)[] beside, "
      "str world, str expert_replicas, int bucket_bytes) -> Tensor",
      finish);
  library.class_<Reducer>("GradientReducer")
      .def(torch::init<Reducer::Named, Reducer::Named, std::string, std::string, int64_t>())
      .def("start", &Reducer::start)
      .def("finish", &Reducer::finish)
      .def("summed", &Reducer::summed);
  operators.def(
      "clip_gradient_norm(Tensor(a!)[] experts, Tensor(b!)[] replicated, str world, "
      "int expert_parallel_size, float max_norm, float loss_scale) -> float",
      clip);
  operators.def("gradients_are_finished(Tensor[] gradients) -> bool", all_finished);
}

}  // namespace anabranch::operators
