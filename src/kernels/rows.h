#pragma once

#include <torch/types.h>

#include <vector>

#include "kernels/csr.h"
#include "kernels/kernels.h"

namespace anabranch {

/// Rows moved and summed by an index.
class RowKernels : public Kernels<RowKernels> {
 public:
  static const RowKernels& cpu();
  static const RowKernels& cuda();

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
  /// Makes all of `tensors`, at most 8 that are floating, contiguous and not empty, NaN if `spoilt` [] is not 0.
  virtual void spoil(const std::vector<torch::Tensor>& tensors,
                     const torch::Tensor& spoilt) const = 0;
};

}  // namespace anabranch
