#include "model/recompute.h"

#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <utility>

namespace train_lm {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Body = std::function<std::vector<torch::Tensor>(const torch::Tensor&)>;

struct BodyHolder : torch::CustomClassHolder {
  explicit BodyHolder(Body body) : body(std::move(body)) {}
  Body body;
};

struct Recomputed : torch::autograd::Function<Recomputed> {
  static variable_list forward(AutogradContext* context, const torch::Tensor& x,
                               const c10::intrusive_ptr<BodyHolder>& holder) {
    context->save_for_backward({x});
    context->saved_data["body"] = torch::IValue::make_capsule(holder);
    auto outputs = holder->body(x);  // in a Function nothing is recorded
    variable_list whole;
    for (const auto& output : outputs) {
      if (!output.is_floating_point()) {
        whole.push_back(output);
      }
    }
    context->mark_non_differentiable(whole);
    return outputs;
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const auto holder =
        c10::static_intrusive_pointer_cast<BodyHolder>(context->saved_data["body"].toCapsule());
    const auto x = context->get_saved_variables()[0].detach().requires_grad_();
    variable_list roots, root_gradients;
    {
      const at::AutoGradMode recorded(true);
      const auto outputs = holder->body(x);
      for (size_t i = 0; i < outputs.size(); ++i) {
        if (outputs[i].requires_grad() && gradients[i].defined()) {
          roots.push_back(outputs[i]);
          root_gradients.push_back(gradients[i]);
        }
      }
    }
    torch::autograd::backward(roots, root_gradients);
    return {x.grad(), {}};
  }
};

}  // namespace

std::vector<torch::Tensor> recomputed(const torch::Tensor& x, const Body& body) {
  return Recomputed::apply(x, c10::make_intrusive<BodyHolder>(body));
}

}  // namespace train_lm
