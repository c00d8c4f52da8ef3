#pragma once

#include "kernels/kernels.h"

namespace anabranch {

/// One pair of files a stage: routing, plan, rows, bias, activation. The .cpp files hold tensors, the
/// .cu files the device code. Everything runs on the current stream of the arguments' device.
class CudaKernels : public Kernels {
 public:
  RouteResult route(const torch::Tensor& logits, const RoutingRule& rule,
                    const torch::Tensor& expert_bias) const override;
  RoutingSums routing_sums(const torch::Tensor& probabilities,
                           const torch::Tensor& logsumexp) const override;
  torch::Tensor batch_sums(const torch::Tensor& counts, int64_t tokens,
                           const RoutingSums& sums) const override;
  BatchLosses batch_losses(const torch::Tensor& sums, const torch::Tensor& chosen, int64_t top_k,
                           torch::Dtype dtype) const override;
  torch::Tensor route_backward(const RouteResult& routed, const RoutingRule& rule,
                               const torch::Tensor& dweights, const torch::Tensor& dprobability_sum,
                               const torch::Tensor& dsquared_logsumexp_sum) const override;

  torch::Tensor split(const torch::Tensor& x, const std::array<int, 3>& parts,
                      bool side_by_side) const override;

  torch::Tensor first_invalid_token(const torch::Tensor& expert_ids, int64_t num_experts,
                                    bool may_skip) const override;
  SendPlan plan_send(const torch::Tensor& expert_ids, const std::vector<int64_t>& first_expert,
                     bool may_skip) const override;
  LocalPlan plan_local(const torch::Tensor& expert_ids, int64_t num_experts) const override;
  ArrivalOrder order_arrivals(const torch::Tensor& segment_rows, const torch::Tensor& rows,
                              const torch::Tensor& counts) const override;
  Csr group(const torch::Tensor& group_of, int64_t groups) const override;

  void gather_rows_into(torch::Tensor out, const torch::Tensor& rows,
                        const torch::Tensor& index) const override;
  torch::Tensor scatter_rows(const torch::Tensor& rows, const Csr& groups) const override;
  torch::Tensor sum_rows(const torch::Tensor& rows, const Csr& groups,
                         const torch::Tensor& weights) const override;

  void add_bias(torch::Tensor& rows, const torch::Tensor& bias,
                const std::vector<int64_t>& counts) const override;
  torch::Tensor bias_gradient(const torch::Tensor& rows, const torch::Tensor& weights,
                              const std::vector<int64_t>& counts) const override;
  torch::Tensor bias_dot(const torch::Tensor& rows, const torch::Tensor& bias,
                         const std::vector<int64_t>& counts) const override;
  torch::Tensor activate(const torch::Tensor& hidden, Activation activation,
                         bool glu) const override;
  void activate_backward(torch::Tensor& dactivated, const torch::Tensor& hidden,
                         const torch::Tensor& weights, Activation activation, bool glu,
                         const ActivationGradient& gradient) const override;
};

}  // namespace anabranch
