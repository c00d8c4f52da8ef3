#pragma once

#include <torch/types.h>

#include <cstdint>
#include <string>

namespace anabranch {

enum class Activation { kGeluTanh, kGelu, kRelu, kSilu };

/// Everything a layer is made of. Every rank of a group builds its layer from equal options.
struct MoEOptions {
  int64_t hidden_size = 0;         ///< h, width of a token
  int64_t expert_hidden_size = 0;  ///< n, inner width of an expert
  int64_t num_experts = 0;         ///< E, over all ranks
  int64_t top_k = 1;               ///< experts a token goes to, 1 ≤ top_k ≤ E

  Activation activation = Activation::kGeluTanh;
  bool glu = false;   ///< activation(gate) · up instead of activation(up)
  bool bias = false;  ///< biases in both projections of every expert
  /// Inner width of an expert that sees every token, of the same kind as the others; 0: none.
  int64_t shared_expert_hidden_size = 0;

  bool renormalize = true;  ///< weights of a token's top_k experts sum to 1
  /// Training only: gate input multiplied by uniform noise in [1 − jitter, 1 + jitter].
  double jitter = 0.0;

  /// Keep only the received rows for backward and compute the up-projection again there.
  bool recompute = false;
  /// Grouped GEMM engine: "auto" or one of `grouped_gemm_engines(device)`.
  std::string engine = "auto";

  torch::Dtype dtype = torch::kFloat32;  ///< fp32, fp64, bf16, fp16; the router stays ≥ fp32
  torch::Device device = torch::kCPU;
  /// Seeds every expert by its global number: the same layer at any number of ranks.
  uint64_t seed = 0;
};

}  // namespace anabranch
