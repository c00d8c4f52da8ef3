#include "routing/expert_choice.h"

#include <ATen/ops/softmax.h>

#include "kernels/routing.h"

namespace anabranch {

torch::Tensor choose_tokens(const torch::Tensor& logits, const RoutingRule& rule,
                            const torch::Tensor& padding_mask, int64_t sequences) {
  // Scores of their own are in the order of their logits.
  const bool softmax = rule.router_score == RouterScore::kSoftmax;
  const auto scores = softmax ? at::softmax(logits, 1) : logits;
  return RoutingKernels::on(logits.device())
      .choose_tokens(scores.contiguous(),
                     padding_mask.defined() ? padding_mask.contiguous() : padding_mask, sequences,
                     rule.top_k);
}

}  // namespace anabranch
