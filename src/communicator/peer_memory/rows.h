#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "communicator/peer_memory/layout.h"

// Rows between the GPUs of one host, moved by a kernel that writes into the other GPUs' memory. Raw
// device pointers and sizes, no LibTorch, so that the .cu file compiles in seconds.
//
// Each rank owns a mailbox that all others have mapped. Between two ranks run `lanes` queues in each
// direction, each of one block of threads on either side: the sender writes into the slots that the
// receiver's mailbox keeps for it, and says how many it has filled; the receiver copies them to where
// the rows are to be, and says how many it has emptied. So neither needs to know the other's tensors,
// and nothing is as large as what is moved.

namespace anabranch::peer {

/// Of one launch.
constexpr int kMaxTransfers = 4;

/// What one rank sends to and receives from each rank of one buffer: see Transfer.
struct Rows {
  const std::byte* source;
  const int64_t* index;  ///< row of `source` for each row sent; null: they are in order
  std::byte* target;
  int64_t row_bytes;
  int64_t send_begin[kMaxRanks];  ///< first row for each rank
  int64_t send_rows[kMaxRanks];
  int64_t receive_begin[kMaxRanks];
  int64_t receive_rows[kMaxRanks];
  /// Where not null: the rows to and from each rank [2, size], which the host does not know, and the four
  /// lists above say nothing.
  const int64_t* counts;
};

struct Arguments {
  Layout layout;
  int rank;
  std::byte* mailboxes[kMaxRanks];  ///< of all ranks, as this GPU sees them
  const int* aborted;               ///< in host memory: not 0 ends the kernel early
  int num_transfers;
  Rows transfers[kMaxTransfers];
};

/// Moves all rows, on `stream`. The other ranks launch the same number of transfers, with the same
/// rows between any two. Throws std::runtime_error when the launch fails.
void launch_exchange(const Arguments& arguments, cudaStream_t stream);

}  // namespace anabranch::peer
