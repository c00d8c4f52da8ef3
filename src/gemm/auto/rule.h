#pragma once

#include <string>
#include <vector>

#include "gemm/auto/product.h"

namespace anabranch {

/// The engines for a product on a GPU by its shape alone, best first: what is taken where nothing may be
/// measured. Read off what was measured on an H200 (benchmarks/results/gpu_grouped_gemm.json).
std::vector<std::string> engines_by_rule(const Product& product);

}  // namespace anabranch
