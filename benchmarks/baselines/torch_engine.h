#pragma once

#include <anabranch/grouped_gemm.h>

namespace anabranch {

/// LibTorch's own grouped product: bf16 on a GPU; fp32, bf16 and fp16 on the CPU. It returns its
/// result, which is copied to where the caller wants it.
std::shared_ptr<GroupedGemmEngine> make_torch_engine(torch::Device device);

/// Where each expert's rows end, [experts] int32 on the device, as the operator wants them. Throws InputError
/// for 2^31 rows and more, of which it cannot be told.
torch::Tensor row_ends(const std::vector<int64_t>& counts, torch::Device device);

}  // namespace anabranch
