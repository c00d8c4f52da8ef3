#include "communicator/peer_memory/rows.cuh"
#include "support/cuda_check.h"

namespace anabranch::peer {
namespace {

constexpr int kThreads = 256;
/// Blocks that move a rank's own rows.
constexpr int kOwnBlocks = 32;

__global__ void __launch_bounds__(kThreads)
    exchange_kernel(const __grid_constant__ Arguments arguments) {
  __shared__ bool waited;
  exchange(arguments, waited);
}

}  // namespace

void launch_exchange(const Arguments& arguments, cudaStream_t stream) {
  int64_t own = 0;
  for (int i = 0; i < arguments.num_transfers; ++i) {
    own += arguments.transfers[i].send_rows[arguments.rank];
  }
  const int blocks = lane_blocks(arguments.layout) + (own > 0 ? kOwnBlocks : 0);
  exchange_kernel<<<blocks, kThreads, 0, stream>>>(arguments);
  check_launch("exchange rows by peers' memory");
}

}  // namespace anabranch::peer
