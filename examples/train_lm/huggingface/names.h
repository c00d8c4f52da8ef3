#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "huggingface/config.h"
#include "model/model_options.h"

namespace train_lm {

/// A tensor of a checkpoint of transformers: some rows of one of ours.
struct HfTensor {
  std::string name;
  int64_t first_row = 0;
  int64_t rows = 0;  ///< 0: all
  /// Of queries and keys so many heads, whose rows have another order: there the two halves of a head are the
  /// parts of complex numbers, here neighbours. 0: in one order.
  int64_t heads = 0;
};

/// What a tensor of our model is made of there, one below the other; of an expert's tensor that of expert
/// number `expert`. Throws std::invalid_argument for one that the family has not.
std::vector<HfTensor> hf_tensors(const HfFamily& family, const ModelOptions& model,
                                 const std::string& name, int64_t expert = 0);

}  // namespace train_lm
