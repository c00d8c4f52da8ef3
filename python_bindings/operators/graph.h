#pragma once

#include <anabranch/moe_layer.h>
#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/types.h>

#include <tuple>
#include <vector>

namespace anabranch::operators {

/// What a forward operator leaves for its backward operator: the part of the autograd graph that the
/// core has recorded, from some of the operator's inputs to its outputs.
///
/// It travels as a tensor, as all that one operator leaves for another must, and lives as long as that
/// tensor's memory: also where a graph is retained, recomputed, compiled or never run backward.
struct RecordedGraph {
  std::vector<torch::autograd::Edge> outputs;
  std::vector<size_t> places;                   ///< of those among all that the operator returns
  std::vector<torch::Tensor> inputs;            ///< leaves of the graph
  std::shared_ptr<const MoEFunction> function;  ///< what has recorded it
};

/// Whether somebody looks at operators, to compile what they are, say, and is to see those that leave a graph
/// behind. Otherwise the core's graph is recorded as a part of the caller's: so hooks on what autograd saves, which
/// move it elsewhere or have it computed again, see what the core saves.
bool is_traced(at::TensorList inputs);

/// Takes `outputs`, all that an operator returns with a gradient, out of the graph that led to those of them that
/// have one; which `graph` keeps.
template <typename... Outputs>
void leave(RecordedGraph& graph, const std::tuple<Outputs&...>& outputs) {
  auto leave_one = [&graph, place = size_t{0}](torch::Tensor& output) mutable {
    if (output.requires_grad()) {
      graph.outputs.push_back(torch::autograd::impl::gradient_edge(output));
      graph.places.push_back(place);
      output = output.detach();
    }
    ++place;
  };
  std::apply([&](auto&... output) { (leave_one(output), ...); }, outputs);
}

/// A byte of host memory that owns `graph`.
torch::Tensor as_tensor(RecordedGraph graph);
/// InputError where `state` is a copy: of what it owns there is none.
const RecordedGraph& recorded_graph(const torch::Tensor& state);

/// The gradients of `graph.inputs`, of those of its outputs, some of which may be undefined: zero. The graph can be used again where the
/// backward that runs is to keep its own.
std::vector<torch::Tensor> run_backward(const RecordedGraph& graph,
                                        const std::vector<torch::Tensor>& gradients);

/// While it lives, operations are recorded as anywhere in a program, although this is the inside of an
/// operator: unless `record` is false. Autocast and hooks on saved tensors stay outside.
class Recording {
 public:
  explicit Recording(bool record);
  ~Recording();
  Recording(const Recording&) = delete;
  Recording& operator=(const Recording&) = delete;

 private:
  c10::impl::ForceDispatchKeyGuard keys_;
  at::AutoGradMode mode_;
  at::impl::SavedTensorDefaultHooksTLS hooks_;
};

}  // namespace anabranch::operators
