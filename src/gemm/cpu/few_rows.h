#pragma once

#include <torch/types.h>

#include <vector>

namespace anabranch {

/// Whether `multiply_few_rows` is quicker than LibTorch's product: in bf16, few rows, as experts have while a model
/// decodes. LibTorch's is made for many, and a call of it costs some 13 µs.
bool takes_few_rows(const torch::Tensor& x, const torch::Tensor& weight);

/// y [m, n] = x [m, k] weightᵀ, weight [n, k]; sums in fp32. A row's result depends on that row and the weight alone.
/// `lanes`: one of vector_widths(); 0 the widest.
void multiply_few_rows(const torch::Tensor& x, const torch::Tensor& weight, torch::Tensor& y,
                       int lanes = 0);

/// Floats in a vector, of those kinds that this processor has, widest first.
std::vector<int> vector_widths();

}  // namespace anabranch
