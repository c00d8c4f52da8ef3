#include "experts/shared_expert.h"

#include <torch/csrc/autograd/custom_function.h>

namespace anabranch {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct FeedForwardHolder : torch::CustomClassHolder {
  explicit FeedForwardHolder(FeedForward value) : value(std::move(value)) {}
  FeedForward value;
};

/// A group of one expert that owns every row.
struct ThroughSharedExpert : torch::autograd::Function<ThroughSharedExpert> {
  static torch::Tensor forward(AutogradContext* context, const torch::Tensor& x,
                               const torch::Tensor& up_weight,
                               const std::optional<torch::Tensor>& up_bias,
                               const torch::Tensor& down_weight,
                               const std::optional<torch::Tensor>& down_bias,
                               const c10::intrusive_ptr<FeedForwardHolder>& feed_forward) {
    const ExpertCounts counts = {x.size(0)};
    const Projection up = projection(up_weight, up_bias);
    const Projection down = projection(down_weight, down_bias);
    const auto hidden = project(feed_forward->value, x, up, counts);
    context->save_for_backward({x, hidden, up.weight, up.bias, down.weight, down.bias});
    context->saved_data["feed_forward"] = torch::IValue::make_capsule(feed_forward);
    return project(feed_forward->value, activate(feed_forward->value, hidden), down, counts);
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const torch::NoGradGuard no_grad;
    const auto saved = context->get_saved_variables();
    const auto feed_forward = c10::static_intrusive_pointer_cast<FeedForwardHolder>(
        context->saved_data["feed_forward"].toCapsule());
    const ExpertCounts counts = {saved[0].size(0)};
    const auto down = down_backward(feed_forward->value, gradients[0].contiguous(), saved[1],
                                    /*values=*/{}, {saved[4], saved[5]}, counts);
    const auto up =
        up_backward(feed_forward->value, down.dhidden, saved[0], {saved[2], saved[3]}, counts);
    return {up.dx,
            up.parameters.weight,
            up.parameters.bias,
            down.parameters.weight,
            down.parameters.bias,
            {}};
  }
};

}  // namespace

Experts make_shared_expert(const MoEOptions& options) {
  MoEOptions shared = options;
  shared.expert_hidden_size = options.shared_expert_hidden_size;
  shared.seed = ~options.seed;
  return Experts(shared, ExpertPlacement{1, 1}, 0, /*sharded=*/false);
}

torch::Tensor through_shared_expert(const torch::Tensor& x, const Experts& shared_expert,
                                    const FeedForward& feed_forward) {
  return ThroughSharedExpert::apply(x, shared_expert->up_weight, given(shared_expert->up_bias),
                                    shared_expert->down_weight, given(shared_expert->down_bias),
                                    c10::make_intrusive<FeedForwardHolder>(feed_forward));
}

}  // namespace anabranch
