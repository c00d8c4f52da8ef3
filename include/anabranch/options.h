#pragma once

#include <torch/types.h>

#include <cstdint>
#include <string>

namespace anabranch {

/// What an expert computes between its projections, element by element.
enum class Activation {
  kGeluTanh,     ///< GELU (arXiv:1606.08415) by its approximation with tanh
  kGelu,         ///< the same by the error function
  kRelu,         ///< max(x, 0)
  kSilu,         ///< x · sigmoid(x)
  kReluSquared,  ///< max(x, 0)² (arXiv:2109.08668; Nemotron)
  kQuickGelu,    ///< x · sigmoid(1.702 x) (arXiv:1606.08415; gpt-oss)
};

/// How a router chooses among the experts.
enum class Gate {
  kTopK,  ///< the top_k best
  /// The top_k best of noisy logits, x·W + ε · (softplus(x·W_noise) + 0.01) with ε normal, in training
  /// (Shazeer et al. 2017, arXiv:1701.06538, section 2.1 and appendix A; their code's 0.01).
  kNoisyTopK,
  /// The best expert, and in training the second one by chance, with probability 2 · its weight
  /// (GShard, arXiv:2006.16668, algorithm 1). Where it is not taken the token has one assignment.
  kGShard,
  /// In training the top_k best after Sinkhorn's scaling of a rank's own tokens to equal loads, weighed by their
  /// plain scores; in evaluation the top_k best (S-BASE, arXiv:2202.01169; Megatron-Core's sinkhorn). A token's
  /// experts so depend on the others of its rank, also on later ones.
  kSinkhorn,
  /// In training experts choose: of each sequence of n tokens every expert takes the ⌈n · top_k / E⌉ that score it
  /// highest, so that a token has any number of experts from none to all (expert choice, arXiv:2202.09368). A
  /// token's experts so depend on the others of its sequence, also on later ones: in evaluation it takes its own
  /// top_k best, by its own scores alone. A sequence is the tokens along the last dimension before h.
  kExpertChoice,
};

/// What makes a logit a score.
enum class RouterScore {
  kSoftmax,
  kSigmoid,
  kSqrtSoftplus,  ///< √log(1 + e^x) (DeepSeek-V4; Megatron-Core's sqrtsoftplus)
};

/// What the biases of experts become after a step, by `update_expert_bias`.
enum class BiasUpdate {
  kSign,  ///< a step of one size towards the mean load (arXiv:2408.15664, algorithm 1)
  /// What would have given each expert its share of the step's tokens, all else as it was (quantile balancing: J. Su,
  /// kexue.fm/archives/11619; Kimi K3's technical report, section 2.3.3, over a histogram as in its appendix D).
  kQuantile,
};

/// The score of a group of experts, from the scores of its experts.
enum class GroupScore {
  kTopTwoSum,  ///< the sum of the two best (DeepSeek-V3, arXiv:2412.19437)
  kMaximum,    ///< the best (DeepSeek-V2, arXiv:2405.04434)
  /// The sum of its best top_k / top_groups, rounded down (Megatron-Core).
  kTopShareSum,
  /// The same of their logits, for the softmax after top-k (Megatron-Core without pre-softmax).
  kTopShareLogitSum,
};

/// Choices that no router makes, for benchmarks: the weights are still its scores.
enum class ForcedRouting {
  kNone,
  kBalanced,  ///< one expert after another: loads differ by one assignment a rank at most
  kRandom,    ///< each token's experts are drawn, all alike probable, in training and evaluation
};

/// When a step says that its routing was refused: NaN or Inf in a gate, expert ids out of range or twice.
enum class Errors {
  /// At the call, where the host learns of it there: on CPUs, and on several ranks. A rank alone on a GPU
  /// waits for nothing: the outputs of tokens that were refused are NaN, and the error comes from the next
  /// call that may know, the next forward of the layer, `check` or `finish_gradients`.
  kLate,
  kAtCall,  ///< always at the call, for which the host waits once a step
};

/// Everything a layer is made of. Every rank of a group builds its layer from equal options.
struct MoEOptions {
  int64_t hidden_size = 0;         ///< h, width of a token
  int64_t expert_hidden_size = 0;  ///< n, inner width of an expert
  int64_t num_experts = 0;         ///< E, over all ranks
  int64_t top_k = 2;               ///< experts a token goes to, 1 ≤ top_k ≤ E

  Activation activation = Activation::kGeluTanh;  ///< of every expert, the shared one too
  bool glu = false;  ///< activation(gate) · up instead of activation(up)
  /// What is activated is at most this, and the up part within ±this (gpt-oss: 7; DeepSeek-V4: 10); 0: no limit.
  double activation_limit = 0.0;
  double glu_offset = 0.0;  ///< added to the up part: activation(gate) · (up + offset) (gpt-oss: 1)
  bool bias = false;        ///< biases in both projections of every expert
  /// Inner width of an expert that sees every token, of the same kind as the others; 0: none.
  int64_t shared_expert_hidden_size = 0;
  bool shared_expert_gate = false;  ///< its output times sigmoid(x · w), w [1, h] (Qwen2-MoE)
  /// Tokens go to the experts as rows of this width, projected down before the exchange and up after it; 0:
  /// as they are. Router and shared expert see them whole (LatentMoE, arXiv:2601.18089; Nemotron 3).
  int64_t latent_size = 0;

  Gate gate = Gate::kTopK;                           ///< how the router chooses
  RouterScore router_score = RouterScore::kSoftmax;  ///< what it makes of a logit
  /// Weights of a token's top_k experts sum to 1. Of softmax scores that is the softmax of the chosen
  /// logits alone: the softmax after top-k instead of before. Not with top_k = 1 of several experts:
  /// every weight would be 1, and the router without a gradient.
  bool renormalize = true;
  double routing_scale = 1.0;  ///< the weights are multiplied by it in the end
  /// A bias of each expert, a buffer, is added to its score where experts are chosen, not in the
  /// weights: balance without a loss (arXiv:2408.15664), by `update_expert_bias`.
  bool expert_bias = false;
  BiasUpdate expert_bias_update = BiasUpdate::kSign;  ///< by which rule
  /// The experts lie in this many groups of equal size, at most 32, in order. A token goes to experts
  /// of its `top_groups` best groups only (DeepSeek-V2 and -V3).
  int64_t expert_groups = 1;
  int64_t top_groups = 1;                               ///< 1 ≤ top_groups ≤ expert_groups
  GroupScore group_score = GroupScore::kTopTwoSum;      ///< by which groups are the best
  ForcedRouting forced_routing = ForcedRouting::kNone;  ///< kNone: the router chooses
  /// Logits, scores and weights are computed in fp64; the router's parameters stay what they are.
  bool router_fp64 = false;
  /// Training only: gate input multiplied by uniform noise in [1 − jitter, 1 + jitter].
  double jitter = 0.0;
  /// Training only: of a rank's choices the share that may leave its node, 0 < share ≤ 1; 0: any. Those of the highest
  /// weights do, the others' tokens choose again among the experts of the node (FasterMoE's topology-aware gate,
  /// doi:10.1145/3503221.3508418, whose share is W_net / (M · W_local) of the network's and the local rate, for M ranks a
  /// node). With Gate::kTopK and one group. It changes the model, which then depends on where the ranks are, and a
  /// token's experts on the other tokens of its rank.
  double cross_node_limit = 0.0;

  /// Coefficients of the losses that make up `MoEOutput::auxiliary_loss`; 0: not part of it.
  double balance_coefficient = 0.0;
  /// A sequence is the tokens along the last dimension before h (DeepSeek-V3, arXiv:2412.19437, eq. 17–20).
  double sequence_balance_coefficient = 0.0;
  /// Of the balance of a whole step, over micro-batches and replicas of the experts: see
  /// `MoEOutput::global_balance_loss`.
  double global_balance_coefficient = 0.0;
  double z_coefficient = 0.0;  ///< of `MoEOutput::z_loss`
  /// The gradient of the auxiliary loss is added where that of the output passes, so that a model that
  /// does not hand the loss on still trains balanced; `MoELayerImpl::set_attached_loss_scale`.
  bool attach_losses = false;

  /// Keep only the received rows for backward and compute the up-projection again there.
  bool recompute = false;
  /// Grouped GEMM engine: "auto", "deterministic" or one of `grouped_gemm_engines(device)`.
  std::string engine = "auto";
  Errors errors = Errors::kLate;  ///< when a refused routing is one
  /// How rows travel between ranks: "off", while a step waits for them; or beside its products, all at once
  /// ("1") or in chunks ("2", "4", "8"), of which some travel while others are computed: of whole experts (Tutel's
  /// pipelining degree), or, where a rank has few, of what some of the ranks send to one (FasterMoE's smart schedule).
  /// Results and gradients are the same; backward keeps more for longer. "auto": the first steps, and some of every
  /// 2,000, take off, 1, 2 and 4 in turn, the others what was the quickest for the slowest rank; not with engine
  /// "deterministic".
  std::string overlap = "off";
  /// Several ranks with late errors, on CPUs or on GPUs that map each other's memory: what a rank has room to
  /// receive in a step, in multiples of its own tokens' assignments, which is the balanced load where all
  /// ranks have as many tokens; num_ranks is enough for any routing then. Counts stay on the device, and the
  /// host does not wait for them. A step that needs more is computed nowhere: its output is NaN, and a
  /// CapacityError is heard late; see `run`. Without receive_rows_limit and balance. 0: as much as arrives, for which the host waits. (Tested on CPUs;
  /// on GPUs it has not been run yet.)
  double receive_capacity = 0;
  /// The most rows of others' tokens and its own that a rank receives at a time, at least one a rank; 0: any
  /// number. A step in which a rank is sent more goes in rounds on all ranks, forward and backward: a part
  /// of the rows is dispatched, computed and combined after another. Of such a step the tokens alone are kept
  /// for backward, which brings them to the experts again. Results are the same but for the rounding of
  /// the experts' gradients, which are sums over rounds.
  int64_t receive_rows_limit = 0;
  /// What travels where some experts have more than their share of a step's tokens: "off", always tokens, to the
  /// experts' owners; or the weights of the fullest experts to other ranks, which compute some of their tokens, and the
  /// weights' gradients back to the owner. "shadow": to all ranks, each for its own tokens (FasterMoE), where a step is
  /// foreseen to be shorter for it, by nominal rates of products and links. "replicas": to as few as leave no rank more
  /// than 1.05 times the mean of the ranks' assignments, whatever it costs. "gather", "gather:G": in each step among all
  /// ranks, or in groups of G of them, in their order, in which no token travels then; a group's ranks share the tokens
  /// of the others (Tutel's parallelism between experts and data). "auto": whichever of all these is foreseen to be
  /// the shortest, by rates that the first step measures; the others choose alike in all runs.
  /// Results are the same within rounding.
  std::string balance = "off";
  /// Which rank holds which experts: "blocks", of as many as they go, in rank order; "sliced", with more ranks than
  /// experts each rank a slice of one expert's hidden dimension (tensor parallelism within experts), otherwise
  /// blocks; "movable", blocks at first, which an ExpertMover changes; or lists, see ExpertPlacement::parse. All expert-parallel groups of a world take the same. Results are
  /// those of blocks, with slices within rounding. Slices go without balance.
  std::string placement = "blocks";

  torch::Dtype dtype = torch::kFloat32;  ///< fp32, fp64, bf16, fp16; the router stays ≥ fp32
  torch::Device device = torch::kCPU;    ///< the CPU or a GPU, of parameters and rows
  /// Seeds every expert by its global number: the same layer at any number of ranks.
  uint64_t seed = 0;
};

}  // namespace anabranch
