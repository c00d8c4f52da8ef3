#pragma once

#include <cublasLt.h>

namespace anabranch {

/// cuBLASLt's grouped products, whose sizes and addresses are arrays in GPU memory. The library that is
/// loaded has them or not, whichever the build has seen: so they are looked up, and what its header
/// would name is named here.
namespace cublaslt_grouped {

/// Number of groups; rows, columns and leading dimension of each, int64 in GPU memory.
using LayoutCreate = cublasStatus_t (*)(cublasLtMatrixLayout_t*, cudaDataType_t, int, const void*,
                                        const void*, const void*);

// Means over the groups, by which algorithms are chosen: int64.
constexpr auto kAverageK = static_cast<cublasLtMatmulPreferenceAttributes_t>(13);
constexpr auto kAverageRows = static_cast<cublasLtMatmulPreferenceAttributes_t>(14);
constexpr auto kAverageColumns = static_cast<cublasLtMatmulPreferenceAttributes_t>(15);

/// The oldest version that is used: of those before, some hang or lose rows on compute capability 9.0
/// (issue 6456362 of cuBLAS's release notes, from 13.4.0 on; before it there was none for that GPU).
constexpr size_t kLeastVersion = 130601;

/// cublasLtGroupedMatrixLayoutCreate of the library that cublasLtMatmul is called in; null where it has
/// none, or is too old.
LayoutCreate find_layout_create();

}  // namespace cublaslt_grouped
}  // namespace anabranch
