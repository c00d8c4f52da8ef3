#pragma once

#include <torch/nn/module.h>

#include <optional>
#include <string>

namespace train_lm {

/// What a token costs and a device can do, for model FLOP/s and their part of the peak (MFU).
struct StepCost {
  double flops_per_token = 0;        ///< forward and backward
  std::optional<double> peak_flops;  ///< FLOP/s of one device, dense, in the type it computes in
};

/// 6 N + 6 L A S FLOPs of matrix products: N weights that a token is multiplied by, which is every
/// matrix of the model but the table that tokens are looked up in (unless it is the head too), and of the experts top_k; two
/// products of S/2 positions and A = ModelOptions::attention_width in each of the L causal attentions. 6: a
/// multiplication and an addition, forward once and backward twice. Recomputation does not count.
/// `attention_width`: L A.
double flops_per_token(const torch::nn::Module& model, int64_t top_k, int64_t attention_width,
                       int64_t sequence_length);

/// Of the data sheet of a GPU by its name, as CUDA says it; nothing for one that is not listed, or in
/// fp64. `dtype`: of the products' operands; that of fp32 is tf32's.
std::optional<double> peak_flops_of(const std::string& gpu, torch::Dtype dtype);

}  // namespace train_lm
