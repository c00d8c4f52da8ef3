#pragma once

#include "kernels/cuda/launch.h"

// Launchers of routing*.cu: see launch.h.

namespace anabranch::cuda {

// `scalar` is kFloat or kDouble.

// routing.cu

/// Of sums of `logit_parts` the logits are given as [T, parts, E].
struct RouteArguments {
  Scalar scalar;
  int64_t tokens;
  int64_t experts;
  int64_t top_k;
  bool renormalize;
  double scale;
  int64_t logit_parts = 1;
};

/// `counts` [E] and `first_nonfinite_token` start at −1: one memset.
struct RouteResults {
  int64_t* expert_ids;
  void* weights;
  void* probabilities;
  void* logsumexp;
  int64_t* counts;
  int64_t* first_nonfinite_token;
};

/// Softmax, and the experts with the largest logits; `scale` is 1. Logits in parts are fp32.
void launch_route(const RouteArguments& arguments, const void* logits, const RouteResults& results,
                  cudaStream_t stream);

struct RouteInputs {
  const int64_t* expert_ids;
  const void* weights;
  const void* probabilities;  ///< of scores other than softmax: the logits
  const void* logsumexp;
  const bool* padding;                 ///< [T], may be null: none
  const void* dweights;                ///< [T, k]
  const void* dprobability_sum;        ///< [E], or [S, E] of sequences; may be null: zero
  int64_t sequence_length;             ///< T / S, or T
  const void* dsquared_logsumexp_sum;  ///< [], may be null: zero
};

/// Where dlogits goes: [T, E], or in bf16 parts [T, 4, E], see GateKernels::split.
struct LogitGradient {
  void* dlogits;  ///< null: in parts, of fp32
  void* split;
  int places[4];
};

/// Of softmax scores, however they were chosen.
void launch_route_backward(const RouteArguments& arguments, const RouteInputs& inputs,
                           const LogitGradient& gradient, cudaStream_t stream);

// by_scores.cu

enum class ScoreKind { kSoftmax, kSigmoid, kSqrtSoftplus };

struct ChoiceArguments {
  ScoreKind score;
  const void* expert_bias;    ///< [E] or null
  const int64_t* expert_ids;  ///< [T, k], the choice itself, or null
  int64_t own_choice;         ///< a token with this as first id has no choice given
  const bool* padding;        ///< [T] or null
  int64_t groups;             ///< at most 32, a divisor of E
  int64_t top_groups;
  int64_t summed;  ///< a group's score is the sum of so many of its best
  bool by_logits;  ///< which experts are chosen, not by scores
};

/// Any scores, biased and from the best groups, or of a choice that is given.
void launch_route_by_scores(const RouteArguments& arguments, const ChoiceArguments& choice,
                            const void* logits, const RouteResults& results, cudaStream_t stream);

/// Of scores other than softmax.
void launch_route_backward_of_scores(const RouteArguments& arguments, ScoreKind score,
                                     const RouteInputs& inputs, const LogitGradient& gradient,
                                     cudaStream_t stream);

// sinkhorn.cu

/// See RoutingKernels::sinkhorn_bias; at least one token.
struct SinkhornArguments {
  int64_t tokens;
  int64_t experts;
  const void* logits;    ///< [T, E]
  const bool* left_out;  ///< [T] or null
  int64_t* sums;         ///< [kSinkhornRounds, E] of zeros
  void* biases;          ///< [2, E], scratch
  void* bias;            ///< [E]
};

void launch_sinkhorn_bias(Scalar scalar, const SinkhornArguments& arguments, cudaStream_t stream);

// choice.cu

/// What an expert takes of a sequence: scores above a key, and of those with it the tokens up to the last.
struct TokenThreshold {
  unsigned long long key;
  int last;  ///< within the sequence
};

/// See RoutingKernels::choose_tokens; at least one token.
struct TokenChoice {
  int64_t tokens;
  int64_t experts;
  int64_t top_k;
  int64_t length;              ///< of a sequence
  bool softmax;                ///< else scores are the logits
  const void* logits;          ///< [T, E]
  const bool* padding;         ///< [T] or null
  void* columns;               ///< [E, T], scratch: the scores
  TokenThreshold* thresholds;  ///< [S, E], scratch
  int64_t* expert_ids;         ///< [T, E]
};

void launch_choose_tokens(Scalar scalar, const TokenChoice& choice, cudaStream_t stream);

struct BiasScores {
  const void* scores;        ///< [T, E]
  const bool* padding;       ///< [T] or null
  const void* bias;          ///< [E]
  const void* least_bias;    ///< []
  const void* largest_bias;  ///< []
  void* cutoffs;             ///< [T], scratch
};

/// Adds to `histogram` [E, bins], see RoutingKernels::bias_histogram; top_k < E.
void launch_bias_histogram(Scalar scalar, int64_t tokens, int64_t experts, int64_t top_k,
                           const BiasScores& given, int64_t bins, int64_t* histogram,
                           cudaStream_t stream);

// sums.cu

/// See RoutingKernels::routing_sums; `scratch` has routing_sums_scratch elements.
struct RoutingSums {
  const void* probabilities;
  const void* logsumexp;
  void* scratch;
  void* probability_sum;
  void* squared_logsumexp_sum;
  int64_t sequences;
  void* sequence_sums;  ///< [S, E]
};

int64_t routing_sums_scratch(int64_t tokens, int64_t experts, int64_t sequences);

/// `scalar` is kFloat or kDouble.
void launch_routing_sums(Scalar scalar, int64_t tokens, int64_t experts, const RoutingSums& sums,
                         cudaStream_t stream);

/// Adds to `counts` [S, E], see RoutingKernels::sequence_counts, of the ids [T, k] of sequences of `length` ids each.
void launch_sequence_counts(Scalar scalar, const int64_t* expert_ids, int64_t sequences,
                            int64_t length, int64_t experts, void* counts, cudaStream_t stream);

/// See RoutingKernels::batch_sums: `out` [2E + 2].
void launch_batch_sums(Scalar scalar, const int64_t* counts, int64_t tokens, int64_t experts,
                       const void* probability_sum, const void* squared_logsumexp_sum, double* out,
                       cudaStream_t stream);

/// See BatchLosses.
struct Losses {
  int64_t* expert_load;
  void* balance;
  void* z;
  double* balance_slope;
  double* z_slope;
};

/// See RoutingKernels::batch_losses; `scalar`, of the losses, is kFloat or kDouble.
void launch_batch_losses(Scalar scalar, const double* sums, const double* chosen, int64_t experts,
                         int64_t top_k, const Losses& losses, cudaStream_t stream);

/// See RoutingKernels::losses_of_one; the sums are of the losses' type.
void launch_losses_of_one(Scalar scalar, const int64_t* counts, int64_t tokens, int64_t experts,
                          const void* probability_sum, const void* squared_logsumexp_sum,
                          int64_t top_k, const Losses& losses, cudaStream_t stream);

}  // namespace anabranch::cuda
