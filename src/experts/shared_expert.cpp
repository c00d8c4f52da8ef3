#include "experts/shared_expert.h"

#include <ATen/OpMathType.h>
#include <torch/csrc/autograd/custom_function.h>

#include <limits>
#include <utility>

#include "routing/gate.h"
#include "support/given.h"
#include "support/initialize.h"
#include "support/observer.h"
#include "support/single_backward.h"
#include "support/tensor_list.h"

namespace anabranch {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct ExpertHolder : torch::CustomClassHolder {
  ExpertHolder(FeedForward expert, WeightSums main_grad, std::optional<FeedForwardOutput> ahead)
      : expert(std::move(expert)), main_grad(std::move(main_grad)), ahead(std::move(ahead)) {}
  FeedForward expert;
  WeightSums main_grad;
  std::optional<FeedForwardOutput> ahead;  ///< until forward takes it
  std::shared_ptr<const Observer> observer = backward_observer();
};

/// The tensors that backward needs.
struct Saved {
  torch::Tensor x;       ///< [T, h]
  torch::Tensor hidden;  ///< [T, n or 2n]
  ExpertProjections shared;

  auto tensors() { return std::tuple_cat(std::tie(x, hidden), tensors_of(shared)); }
};

/// A group of one expert that owns every row.
struct ThroughSharedExpert : torch::autograd::Function<ThroughSharedExpert> {
  static torch::Tensor forward(AutogradContext* context, const torch::Tensor& x,
                               const torch::Tensor& up_weight, const torch::Tensor& down_weight,
                               const std::optional<torch::Tensor>& up_bias,
                               const std::optional<torch::Tensor>& down_bias,
                               const c10::intrusive_ptr<ExpertHolder>& holder) {
    const ExpertProjections shared{projection(up_weight, up_bias),
                                   projection(down_weight, down_bias)};
    const auto [y, hidden] = holder->ahead.has_value()
                                 ? *std::exchange(holder->ahead, std::nullopt)
                                 : shared_expert_ahead(x, shared, holder->expert);
    context->save_for_backward(pack(Saved{x, hidden, shared}));
    context->saved_data["expert"] = torch::IValue::make_capsule(holder);
    return y;
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    refuse_double_backward("shared expert");
    const torch::NoGradGuard no_grad;
    const auto [x, hidden, shared] = unpack<Saved>(context->get_saved_variables());
    const auto holder =
        c10::static_intrusive_pointer_cast<ExpertHolder>(context->saved_data["expert"].toCapsule());
    const auto observed = begin(holder->observer);
    auto wanted = wanted_gradients(context, /*first=*/1, shared);
    wanted.sums = holder->main_grad;
    const auto [gradients_of, dx, drouting_weights] = feed_forward_backward(
        holder->expert, {gradients[0].contiguous(), {}}, {x, {}}, hidden, /*routing_weights=*/{},
        shared, {x.size(0)}, /*overwrite_hidden=*/false, wanted);
    return {dx,
            gradients_of.up.weight,
            gradients_of.down.weight,
            gradients_of.up.bias,
            gradients_of.down.bias,
            {}};
  }
};

}  // namespace

Experts make_shared_expert(const MoEOptions& options) {
  MoEOptions shared = options;
  shared.expert_hidden_size = options.shared_expert_hidden_size;
  shared.latent_size = 0;
  shared.seed = ~options.seed;
  return Experts(shared, ExpertPlacement{1, 1}, 0, /*sharded=*/false);
}

FeedForwardOutput shared_expert_ahead(const torch::Tensor& x,
                                      const ExpertProjections& shared_expert,
                                      const FeedForward& expert) {
  const torch::NoGradGuard no_grad;
  return feed_forward(expert, {x, {}}, shared_expert, {x.size(0)}, /*keep_hidden=*/true);
}

torch::Tensor through_shared_expert(const torch::Tensor& x, const ExpertProjections& shared_expert,
                                    const WeightSums& main_grad, const FeedForward& expert,
                                    std::optional<FeedForwardOutput> ahead) {
  const auto& [up, down] = shared_expert;
  return ThroughSharedExpert::apply(
      x, up.weight, down.weight, given(up.bias), given(down.bias),
      c10::make_intrusive<ExpertHolder>(expert, main_grad, std::move(ahead)));
}

torch::Tensor make_shared_expert_gate(const MoEOptions& options) {
  auto gate =
      torch::empty({1, options.hidden_size}, torch::dtype(options.dtype).device(options.device));
  constexpr uint64_t kStream = std::numeric_limits<uint64_t>::max();  // apart from the experts'
  fill_uniform(gate, options.hidden_size, ~options.seed, kStream);
  return gate;
}

torch::Tensor gated(const torch::Tensor& y, const torch::Tensor& x, const torch::Tensor& gate) {
  if (!gate.defined()) {
    return y;
  }
  // Not a product in 16 bits: the gate's gradient is a sum over all tokens, of which cuBLAS may lose some.
  const auto logits = gate_logits(x, gate.to(at::toOpMathType(x.scalar_type())));
  return y * torch::sigmoid(logits).to(y.scalar_type());
}

}  // namespace anabranch
