#pragma once

#include <anabranch/router.h>
#include <torch/types.h>

#include <array>
#include <cstdint>
#include <vector>

namespace anabranch {

/// What one rank's tokens send where. [T, k] routing, E experts, W ranks; all int64.
struct SendPlan {
  torch::Tensor expert_counts;  ///< [E] assignments per expert (then [1] of none, if there may be)
  torch::Tensor rank_rows;      ///< [W] distinct tokens per rank
  torch::Tensor send_tokens;    ///< [≥ S] tokens by (rank, token); S = Σ rank_rows
  torch::Tensor token_offsets;  ///< [T+1]
  torch::Tensor token_rows;     ///< [≥ S] rows of each token in send_tokens, ascending
  torch::Tensor send_order;     ///< [T·k] flat (token, slot), by (expert, token)
  torch::Tensor segment_rows;   ///< [T·k] int32, row of each, within its rank's segment
};

/// Offsets [groups+1] and members [P] of a grouping; members ascend within a group.
struct Csr {
  torch::Tensor offsets;
  torch::Tensor members;
};

/// Arrived assignments by (expert, source, token).
struct ArrivalOrder {
  torch::Tensor received_order;   ///< [P] place in the order of arrival
  torch::Tensor assignment_rows;  ///< [P] received row
};

/// What a rank plans that has all experts: every token is a row that stays. [T, k] routing, E experts;
/// all int64.
struct LocalPlan {
  torch::Tensor expert_counts;    ///< [E]
  torch::Tensor send_order;       ///< [T·k] flat (token, slot), by (expert, token)
  torch::Tensor assignment_rows;  ///< [T·k] token of each of these
  Csr by_row;                     ///< of T tokens, their places in send_order
  torch::Tensor places;           ///< 0, 1, 2, .., of max(T + 1, T·k) numbers
};

struct RouteResult {
  torch::Tensor expert_ids;             ///< [T, k] int64, best choice first
  torch::Tensor weights;                ///< [T, k]
  torch::Tensor probabilities;          ///< [T, E] softmax, or sigmoids over their sum
  torch::Tensor logsumexp;              ///< [T]
  torch::Tensor counts;                 ///< [E] int64
  torch::Tensor first_nonfinite_token;  ///< [] int64, -1 if none
};

/// Over the tokens.
struct RoutingSums {
  torch::Tensor probabilities;      ///< [E]
  torch::Tensor squared_logsumexp;  ///< []
};

/// Of a batch, and their gradients in its sums.
struct BatchLosses {
  torch::Tensor expert_load;    ///< [E] int64
  torch::Tensor balance;        ///< []
  torch::Tensor z;              ///< []
  torch::Tensor balance_slope;  ///< [E] fp64: in the probability sums
  torch::Tensor z_slope;        ///< [] fp64: in the sum of squared logsumexp
};

/// The softmax's largest are the largest logits: no more is needed than those.
inline bool is_plain(const RoutingRule& rule, const torch::Tensor& expert_bias) {
  return rule.router_score == RouterScore::kSoftmax && rule.routing_scale == 1 &&
         rule.expert_groups == 1 && !expert_bias.defined();
}

/// What a device computes for the stages: everything but the GEMMs. Index tensors are int64 unless
/// said otherwise, value tensors fp32, fp64, bf16 or fp16; sums are taken in fp32 (fp64 for fp64) in
/// a fixed order. Arguments are trusted: the stages check them.
class Kernels {
 public:
  virtual ~Kernels() = default;

  // routing: logits [T, E] fp32 or fp64
  /// `expert_bias` [E] of the logits' type or undefined.
  virtual RouteResult route(const torch::Tensor& logits, const RoutingRule& rule,
                            const torch::Tensor& expert_bias) const = 0;
  /// Of probabilities [T, E] and logsumexp [T].
  virtual RoutingSums routing_sums(const torch::Tensor& probabilities,
                                   const torch::Tensor& logsumexp) const = 0;
  /// [2E + 2] fp64: counts [E] int64, tokens, and the two sums.
  virtual torch::Tensor batch_sums(const torch::Tensor& counts, int64_t tokens,
                                   const RoutingSums& sums) const = 0;
  /// From such sums, over all ranks: balance = E / k · Σ chosen · probability sum / tokens², with
  /// `chosen` [E] fp64, k choices a token; z = Σ logsumexp² / tokens. Both of type `dtype`, fp32 or
  /// fp64; 0 where there are no tokens.
  virtual BatchLosses batch_losses(const torch::Tensor& sums, const torch::Tensor& chosen,
                                   int64_t top_k, torch::Dtype dtype) const = 0;
  /// dlogits [T, E] from the gradients of the weights [T, k], of the probability sum [E] and of the
  /// sum of squared logsumexp []. Of `routed` ids, weights and logsumexp are read, and
  /// `probabilities`, in the place of which sigmoids take the logits.
  virtual torch::Tensor route_backward(const RouteResult& routed, const RoutingRule& rule,
                                       const torch::Tensor& dweights,
                                       const torch::Tensor& dprobability_sum,
                                       const torch::Tensor& dsquared_logsumexp_sum) const = 0;

  /// x fp32 [m, n] in bf16 numbers: part 0 is x rounded, each further one the rounded rest, so that
  /// x = Σ parts 0..2. Place s of the result holds part `parts[s]`: [3, m, n], or [m, 3, n] if
  /// `side_by_side`.
  virtual torch::Tensor split(const torch::Tensor& x, const std::array<int, 3>& parts,
                              bool side_by_side) const = 0;

  // plan
  /// [] int64: first token with an id outside [0, num_experts) or twice, or -1. With `may_skip` an id
  /// of -1 is none and valid.
  virtual torch::Tensor first_invalid_token(const torch::Tensor& expert_ids, int64_t num_experts,
                                            bool may_skip = false) const = 0;
  /// `first_expert` [W+1]: rank r owns experts first_expert[r] .. first_expert[r+1]−1.
  /// The result for ids that are not valid is discarded by the caller, but safe to compute. With
  /// `may_skip` ids of -1 come last in send_order and segment_rows, behind all assignments, and last
  /// in expert_counts, which then has E+1 elements. A rank is sent the tokens with an expert there; of
  /// a rank alone every token is a row, for then x itself is what arrives.
  virtual SendPlan plan_send(const torch::Tensor& expert_ids,
                             const std::vector<int64_t>& first_expert,
                             bool may_skip = false) const = 0;
  /// Of ids as above, where none is -1.
  virtual LocalPlan plan_local(const torch::Tensor& expert_ids, int64_t num_experts) const = 0;
  /// Brings arrivals into expert-major order. `segment_rows` [P] int32: row of each arrived
  /// assignment within its source's segment, ordered by (source, expert); `rows` [W] and `counts`
  /// [W, local experts]: rows and assignments per expert that came from each source.
  virtual ArrivalOrder order_arrivals(const torch::Tensor& segment_rows, const torch::Tensor& rows,
                                      const torch::Tensor& counts) const = 0;
  /// Groups positions 0..P−1 of `group_of` [P] by their value in [0, groups).
  virtual Csr group(const torch::Tensor& group_of, int64_t groups) const = 0;

  // rows
  /// out[i] = rows[index[i]]; rows [N, h], index [M] → [M, h]. `rows` may also be a vector [N].
  torch::Tensor gather_rows(const torch::Tensor& rows, const torch::Tensor& index) const;
  virtual void gather_rows_into(torch::Tensor out, const torch::Tensor& rows,
                                const torch::Tensor& index) const = 0;
  /// out[p] = rows[g] for each p of group g: gather_rows by the rows, each read once. rows [groups, h],
  /// members a permutation of 0..P−1 → [P, h].
  virtual torch::Tensor scatter_rows(const torch::Tensor& rows, const Csr& groups) const = 0;
  /// out[g] = Σ_{p in group g} weights[p] · rows[p], in ascending p; weights [P] may be undefined.
  virtual torch::Tensor sum_rows(const torch::Tensor& rows, const Csr& groups,
                                 const torch::Tensor& weights) const = 0;

  // experts; `counts` [experts] are the rows of each, expert-major
  /// rows[p] += bias[expert of p]; bias [experts, m].
  virtual void add_bias(torch::Tensor& rows, const torch::Tensor& bias,
                        const std::vector<int64_t>& counts) const = 0;
  /// [experts, m]: Σ over an expert's rows of weights[p] · rows[p]; weights may be undefined.
  virtual torch::Tensor bias_gradient(const torch::Tensor& rows, const torch::Tensor& weights,
                                      const std::vector<int64_t>& counts) const = 0;
  /// [P] in fp32 (fp64): ⟨rows[p], bias[expert of p]⟩.
  virtual torch::Tensor bias_dot(const torch::Tensor& rows, const torch::Tensor& bias,
                                 const std::vector<int64_t>& counts) const = 0;
  /// hidden [P, n] (glu: [P, 2n], gate then up) → [P, n].
  virtual torch::Tensor activate(const torch::Tensor& hidden, Activation activation,
                                 bool glu) const = 0;
  /// Where the backward of the activation writes.
  struct ActivationGradient {
    torch::Tensor dhidden;   ///< [P, n or 2n], scaled by the weight; may be hidden itself
    torch::Tensor dweights;  ///< [P] in fp32 (fp64): ⟨dactivated, activation(hidden)⟩
  };
  /// `dactivated` [P, n] is the gradient at the activation before the routing weight is applied, and
  /// becomes weight · activation(hidden). `weights` [P] undefined means 1.
  virtual void activate_backward(torch::Tensor& dactivated, const torch::Tensor& hidden,
                                 const torch::Tensor& weights, Activation activation, bool glu,
                                 const ActivationGradient& gradient) const = 0;
};

const Kernels& cpu_kernels();
/// Throws std::runtime_error in a build without CUDA.
const Kernels& cuda_kernels();
/// The kernels of a device; InputError for a device that has none.
const Kernels& kernels_for(torch::Device device);

}  // namespace anabranch
