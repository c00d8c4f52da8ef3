#include "communicator/peer_memory/rows.cuh"
#include "support/cuda/check.h"

namespace anabranch::peer {
namespace {

constexpr int kThreads = 256;
/// Blocks that move a rank's own rows.
constexpr int kOwnBlocks = 32;

template <bool kCounted>
__global__ void __launch_bounds__(kThreads)
    exchange_kernel(const __grid_constant__ Arguments arguments) {
  __shared__ bool waited;
  exchange<kCounted>(arguments, waited);
}

}  // namespace

void launch_exchange(const Arguments& arguments, cudaStream_t stream) {
  int64_t own = 0;
  bool counted = false;
  for (int i = 0; i < arguments.num_transfers; ++i) {
    const Rows& rows = arguments.transfers[i];
    counted = counted || rows.counts != nullptr;
    own += rows.counts != nullptr ? 1 : rows.send_rows[arguments.rank];  // or none: who knows
  }
  const int blocks = lane_blocks(arguments.layout) + (own > 0 ? kOwnBlocks : 0);
  const auto kernel = counted ? exchange_kernel<true> : exchange_kernel<false>;
  kernel<<<blocks, kThreads, 0, stream>>>(arguments);
  check_launch("exchange rows by peers' memory");
}

}  // namespace anabranch::peer
