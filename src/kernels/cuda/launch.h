#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

// Launchers of the device code: raw device pointers and sizes, no LibTorch, so that the .cu files
// compile in seconds. They run on `stream`, launch nothing for empty tensors and throw
// std::runtime_error when a launch fails. Shapes and meanings are those of kernels/kernels.h.

namespace anabranch::cuda {

enum class Scalar { kFloat, kDouble, kBFloat16, kHalf };
enum class ActivationKind { kGeluTanh, kGelu, kRelu, kSilu };

// routing.cu; `scalar` is kFloat or kDouble

struct RouteArguments {
  Scalar scalar;
  int64_t tokens;
  int64_t experts;
  int64_t top_k;
  bool renormalize;
  double scale;
};

/// `counts` [E] starts at 0 and `first_nonfinite_token` at −1.
struct RouteResults {
  int64_t* expert_ids;
  void* weights;
  void* probabilities;
  void* logsumexp;
  int64_t* counts;
  int64_t* first_nonfinite_token;
};

/// Softmax, and the experts with the largest logits; `scale` is 1.
void launch_route(const RouteArguments& arguments, const void* logits, const RouteResults& results,
                  cudaStream_t stream);

struct RouteInputs {
  const int64_t* expert_ids;
  const void* weights;
  const void* probabilities;  ///< of sigmoids: the logits
  const void* logsumexp;
  const void* dweights;                ///< [T, k]
  const void* dprobability_sum;        ///< [E]
  const void* dsquared_logsumexp_sum;  ///< []
};

/// Of softmax scores, however they were chosen.
void launch_route_backward(const RouteArguments& arguments, const RouteInputs& inputs,
                           void* dlogits, cudaStream_t stream);

// routing_by_scores.cu

struct ChoiceArguments {
  bool sigmoid;
  const void* expert_bias;  ///< [E] or null
  int64_t groups;           ///< at most 32, a divisor of E
  int64_t top_groups;
  bool top_two_sum;  ///< of a group, not its best alone
};

/// Any scores, biased and from the best groups.
void launch_route_by_scores(const RouteArguments& arguments, const ChoiceArguments& choice,
                            const void* logits, const RouteResults& results, cudaStream_t stream);

void launch_route_backward_of_sigmoids(const RouteArguments& arguments, const RouteInputs& inputs,
                                       void* dlogits, cudaStream_t stream);

// routing_sums.cu

/// See Kernels::routing_sums; `scratch` has routing_sums_scratch elements.
struct RoutingSums {
  const void* probabilities;
  const void* logsumexp;
  void* scratch;
  void* probability_sum;
  void* squared_logsumexp_sum;
};

int64_t routing_sums_scratch(int64_t tokens, int64_t experts);

/// `scalar` is kFloat or kDouble.
void launch_routing_sums(Scalar scalar, int64_t tokens, int64_t experts, const RoutingSums& sums,
                         cudaStream_t stream);

/// See Kernels::batch_sums: `out` [2E + 2].
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

/// See Kernels::batch_losses; `scalar`, of the losses, is kFloat or kDouble.
void launch_batch_losses(Scalar scalar, const double* sums, const double* chosen, int64_t experts,
                         int64_t top_k, const Losses& losses, cudaStream_t stream);

// split.cu

/// `parts`: three of them. See Kernels::split.
void launch_split(const float* x, int64_t m, int64_t n, const int* parts, bool side_by_side,
                  void* out, cudaStream_t stream);

// plan.cu

/// `token` starts at −1. `least_id`: 0, or −1 where an id of −1 is none.
void launch_first_invalid_token(const int64_t* expert_ids, int64_t tokens, int64_t top_k,
                                int64_t num_experts, int64_t least_id, int64_t* token,
                                cudaStream_t stream);

/// int64 elements of scratch that `launch_group` needs.
int64_t group_scratch(int64_t count, int64_t groups);

/// offsets [groups+1], members [count]: positions by (key, position). Keys outside [0, groups) count
/// as the last.
void launch_group(const int64_t* keys, int64_t count, int64_t groups, int64_t* scratch,
                  int64_t* offsets, int64_t* members, cudaStream_t stream);

/// Which (token, rank) pairs exist. Each has a first assignment, the one of the lowest slot.
struct TokenRanks {
  /// [T·k] flat index of the first assignment of the same (token, rank); of a negative id, its own
  int64_t* first;
  int64_t* key;    ///< [T·k] rank at first assignments, W elsewhere
  int64_t* ranks;  ///< [T] distinct ranks of a token
};

/// `first_expert` [W+1] on the device. Negative ids are of no rank.
void launch_token_ranks(const int64_t* expert_ids, int64_t tokens, int64_t top_k,
                        const int64_t* first_expert, int64_t ranks, const TokenRanks& pairs,
                        cudaStream_t stream);

/// From `sent` [T·k], flat assignments by (key, token): the token of each sent row, and
/// `row_of` [T·k], its inverse.
void launch_send_tokens(const int64_t* sent, int64_t count, int64_t top_k, int64_t* send_tokens,
                        int64_t* row_of, cudaStream_t stream);

void launch_token_rows(const TokenRanks& pairs, const int64_t* row_of, const int64_t* token_offsets,
                       int64_t tokens, int64_t top_k, int64_t ranks, int64_t* token_rows,
                       cudaStream_t stream);

/// `segments` [W+1]: first row of each rank's segment.
void launch_segment_rows(const int64_t* send_order, int64_t count, const TokenRanks& pairs,
                         const int64_t* row_of, const int64_t* segments, int32_t* segment_rows,
                         cudaStream_t stream);

/// See LocalPlan. `send_order` and `expert_offsets` [E+1] are those of the ids' grouping by expert.
struct Local {
  const int64_t* expert_ids;
  const int64_t* send_order;
  const int64_t* expert_offsets;
  int64_t tokens;
  int64_t top_k;
  int64_t experts;
  int64_t* expert_counts;
  int64_t* assignment_rows;
  int64_t* row_offsets;
  int64_t* row_members;
  int64_t* places;
};

void launch_local(const Local& plan, cudaStream_t stream);

/// `source_ends` [W·L] by (source, expert), `expert_ends` [L·W] by (expert, source) and `row_ends`
/// [W]: inclusive running sums of the counts; L local experts.
void launch_order_arrivals(const int32_t* segment_rows, int64_t count, const int64_t* source_ends,
                           const int64_t* expert_ends, const int64_t* row_ends, int64_t ranks,
                           int64_t experts, int64_t* received_order, int64_t* assignment_rows,
                           cudaStream_t stream);

// rows.cu

void launch_gather_rows(const void* rows, const int64_t* index, int64_t count, int64_t row_bytes,
                        void* out, cudaStream_t stream);

void launch_scatter_rows(const void* rows, const int64_t* offsets, const int64_t* members,
                         int64_t groups, int64_t row_bytes, void* out, cudaStream_t stream);

/// `weights` may be null.
void launch_sum_rows(Scalar scalar, const void* rows, const int64_t* offsets,
                     const int64_t* members, const void* weights, int64_t groups, int64_t width,
                     void* out, cudaStream_t stream);

// bias.cu; expert e owns rows offsets[e] .. offsets[e+1]−1, `offsets` on the device

void launch_add_bias(Scalar scalar, void* rows, const void* bias, const int64_t* offsets,
                     int64_t experts, int64_t count, int64_t width, cudaStream_t stream);

void launch_bias_dot(Scalar scalar, const void* rows, const void* bias, const int64_t* offsets,
                     int64_t experts, int64_t count, int64_t width, void* out, cudaStream_t stream);

/// Rows that `launch_bias_gradient` sums into one partial sum.
constexpr int64_t kBiasChunk = 512;

/// Strips of columns that `launch_bias_gradient` sums at a time.
int64_t bias_strips(Scalar scalar, const void* rows, int64_t width);

/// `chunks` [experts+1]: first chunk of each expert, whose rows are cut into pieces of kBiasChunk;
/// `partial` [chunks[experts], width] of the accumulation type is scratch, and so is `done`
/// [experts, bias_strips], of zeros. `weights` may be null. Experts without rows: not written.
void launch_bias_gradient(Scalar scalar, const void* rows, const void* weights,
                          const int64_t* offsets, const int64_t* chunks, int64_t num_chunks,
                          int64_t experts, int64_t width, unsigned* done, void* partial, void* out,
                          cudaStream_t stream);

// activation.cu

struct ActivationArguments {
  Scalar scalar;
  ActivationKind activation;
  bool glu;
  int64_t rows;
  int64_t width;  ///< n
};

void launch_activate(const ActivationArguments& arguments, const void* hidden, void* activated,
                     cudaStream_t stream);

/// `weights` may be null; `weighted` may be `dactivated`.
void launch_activate_backward(const ActivationArguments& arguments, const void* dactivated,
                              const void* hidden, const void* weights, void* dhidden,
                              void* weighted, void* dweights, cudaStream_t stream);

}  // namespace anabranch::cuda
