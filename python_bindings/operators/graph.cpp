#include "graph.h"

#include <ATen/core/TorchDispatchUtils.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/graph_task.h>

#include <algorithm>

#include "support/check.h"

namespace anabranch::operators {
namespace {

struct Owner {
  RecordedGraph graph;
  uint8_t byte = 0;
};

void release(void* owner) { delete static_cast<Owner*>(owner); }

c10::impl::LocalDispatchKeySet keys_of_a_program(bool record) {
  auto keys = c10::impl::tls_local_dispatch_key_set();
  if (record) {
    keys.excluded_ = keys.excluded_ - c10::autograd_dispatch_keyset_with_ADInplaceOrView;
  }
  keys.excluded_ = keys.excluded_ | c10::autocast_dispatch_keyset;
  return keys;
}

}  // namespace

bool is_traced(at::TensorList inputs) {
  return c10::impl::dispatch_mode_enabled() || at::impl::tensorlist_has_dispatch(inputs) ||
         std::any_of(inputs.begin(), inputs.end(), [](const torch::Tensor& input) {
           return !(input.is_cpu() || input.is_cuda()) ||
                  input.key_set().has(c10::DispatchKey::Functionalize);
         });
}

torch::Tensor as_tensor(RecordedGraph graph) {
  auto* owner = new Owner{std::move(graph)};
  at::DataPtr data(&owner->byte, owner, &release, torch::kCPU);
  at::Storage storage(at::Storage::use_byte_size_t(), /*size_bytes=*/1, std::move(data));
  return at::empty({0}, torch::kByte).set_(storage, 0, {1}, {1});
}

const RecordedGraph& recorded_graph(const torch::Tensor& state) {
  const auto& data = state.storage().data_ptr();
  check_input(
      data.get_deleter() == &release,
      "backward: the state of the forward is a copy, which holds nothing; hooks on the saved "
      "tensors of what is compiled must leave it, one byte of host memory, as it is");
  return static_cast<const Owner*>(data.get_context())->graph;
}

std::vector<torch::Tensor> run_backward(const RecordedGraph& graph,
                                        const std::vector<torch::Tensor>& gradients) {
  std::vector<torch::autograd::Edge> inputs;
  for (const auto& input : graph.inputs) {
    inputs.push_back(torch::autograd::impl::gradient_edge(input));
  }
  std::vector<torch::autograd::Edge> outputs;
  std::vector<torch::Tensor> of_outputs;
  for (size_t i = 0; i < graph.outputs.size(); ++i) {
    if (!gradients[i].defined()) continue;
    outputs.push_back(graph.outputs[i]);
    of_outputs.push_back(gradients[i]);
  }
  if (outputs.empty()) {
    return std::vector<torch::Tensor>(inputs.size());
  }
  return torch::autograd::Engine::get_default_engine().execute(
      outputs, of_outputs, torch::autograd::get_current_graph_task_keep_graph(),
      /*create_graph=*/false, /*accumulate_grad=*/false, inputs);
}

Recording::Recording(bool record)
    : keys_(keys_of_a_program(record)),
      mode_(record),
      hooks_(at::SavedTensorDefaultHooks::get_tls_state()) {
  at::SavedTensorDefaultHooks::set_tls_state({});
}

Recording::~Recording() { at::SavedTensorDefaultHooks::set_tls_state(hooks_); }

}  // namespace anabranch::operators
