#include "model/loss.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "fused_kernels/kernels.h"

namespace train_lm {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Tokens whose logits are in memory at a time: at most 1 GiB of them.
int64_t chunk_of(const torch::Tensor& head) {
  constexpr int64_t kBytes = int64_t{1} << 30;
  // Without a kernel of its own the loss has log-probabilities and their gradient besides.
  const int64_t copies = has_kernels_for(head) ? 1 : 4;
  return std::max<int64_t>(kBytes / (head.size(0) * head.element_size() * copies), 1);
}

torch::Dtype accumulation_type(torch::Dtype type) {
  return at::isReducedFloatingType(type) ? at::kFloat : type;
}

/// Log-probabilities [T, V], in fp32 at least.
torch::Tensor log_probabilities(const torch::Tensor& logits) {
  return at::_log_softmax(logits.to(accumulation_type(logits.scalar_type())), 1,
                          /*half_to_float=*/false);
}

/// Of scale · Σ −ln p(target), with respect to the logits, in their type.
torch::Tensor logits_gradient(const torch::Tensor& log_probabilities, const torch::Tensor& targets,
                              double scale, torch::Dtype type) {
  const auto gradient = at::zeros_like(log_probabilities).scatter_(1, targets.unsqueeze(1), -scale);
  return at::_log_softmax_backward_data(gradient, log_probabilities, 1,
                                        log_probabilities.scalar_type())
      .to(type);
}

struct LogitsLoss {
  torch::Tensor sum;       ///< []
  torch::Tensor gradient;  ///< as the logits, of scale · sum; undefined if not wanted
};
LogitsLoss of_logits(torch::Tensor logits, const torch::Tensor& targets, double scale,
                     bool with_gradient) {
  if (has_kernels_for(logits)) {
    const auto losses = cross_entropy_of_rows(logits, targets, scale, with_gradient);
    return {losses.sum(), with_gradient ? logits : torch::Tensor()};
  }
  const auto likely = log_probabilities(logits);
  const auto sum = at::nll_loss(likely, targets, /*weight=*/{}, at::Reduction::Sum);
  return {sum, with_gradient ? logits_gradient(likely, targets, scale, logits.scalar_type())
                             : torch::Tensor()};
}

struct Chunked : torch::autograd::Function<Chunked> {
  static variable_list forward(AutogradContext* context, const torch::Tensor& hidden,
                               const torch::Tensor& head, const torch::Tensor& targets,
                               double scale, bool with_gradients) {
    const int64_t tokens = hidden.size(0);
    const int64_t chunk = chunk_of(head);
    const auto type = accumulation_type(head.scalar_type());
    auto sum = at::zeros({}, hidden.options().dtype(type));
    torch::Tensor dhidden, dhead;
    if (with_gradients) {
      dhidden = at::empty_like(hidden);
      dhead = tokens == 0 ? at::zeros_like(head) : torch::Tensor();
    }
    for (int64_t first = 0; first < tokens; first += chunk) {
      const int64_t count = std::min(chunk, tokens - first);
      const auto x = hidden.narrow(0, first, count);
      const auto wanted = targets.narrow(0, first, count);
      const auto [losses, dlogits] = of_logits(x.mm(head.t()), wanted, scale, with_gradients);
      sum += losses;
      if (!with_gradients) {
        continue;
      }
      auto dx = dhidden.narrow(0, first, count);
      at::mm_out(dx, dlogits, head);
      const auto part = dlogits.t().mm(x);
      dhead = !dhead.defined() ? (count == tokens ? part : part.to(type)) : dhead.add_(part);
    }
    if (with_gradients) {
      context->save_for_backward({dhidden, dhead.to(head.scalar_type())});
    }
    context->mark_non_differentiable({sum});
    return {sum, sum * scale};
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const auto saved = context->get_saved_variables();
    const auto& factor = gradients[1];
    return {saved[0] * factor.to(saved[0].scalar_type()),
            saved[1] * factor.to(saved[1].scalar_type()),
            {},
            {},
            {}};
  }
};

}  // namespace

TokenLoss cross_entropy(const torch::Tensor& hidden, const torch::Tensor& head,
                        const torch::Tensor& targets, double scale) {
  const bool with_gradients =
      at::GradMode::is_enabled() && (hidden.requires_grad() || head.requires_grad());
  const auto losses =
      Chunked::apply(hidden.flatten(0, -2), head, targets.flatten(), scale, with_gradients);
  return {losses[0], losses[1]};
}

}  // namespace train_lm
