#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

// Rows between the GPUs of one host, moved by a kernel that writes into the other GPUs' memory. Raw
// device pointers and sizes, no LibTorch, so that the .cu file compiles in seconds.
//
// Each rank owns a mailbox that all others have mapped. Between two ranks run `lanes` queues in each
// direction, each of one block of threads on either side: the sender writes into the slots that the
// receiver's mailbox keeps for it, and says how many it has filled; the receiver copies them to where
// the rows are to be, and says how many it has emptied. So neither needs to know the other's tensors,
// and nothing is as large as what is moved.

namespace anabranch::peer {

constexpr int kMaxRanks = 8;
/// Of one launch.
constexpr int kMaxTransfers = 4;
/// Slots of a queue, and their size.
constexpr int kSlots = 2;
constexpr int64_t kSlotBytes = 256 << 10;

/// Of the queues between the mailbox's owner and one other rank on one lane. The first two are
/// written by that other rank, on its own GPU, the last two by the owner. They only grow.
struct alignas(128) Queues {
  uint64_t filled;    ///< slots of the mailbox that the other has filled
  uint64_t emptied;   ///< slots of the other's mailbox, filled by the owner, that it has emptied
  uint64_t sent;      ///< slots that the owner has filled
  uint64_t received;  ///< slots that the owner has emptied
};

/// Where things are in a mailbox of `size` ranks: the slots of all queues, then the queues.
struct Layout {
  int size;
  int lanes;

  constexpr int64_t queues() const { return int64_t{size - 1} * lanes; }
  constexpr int64_t bytes() const {
    return queues() * (kSlots * kSlotBytes + static_cast<int64_t>(sizeof(Queues)));
  }
  // From the mailbox's begin, in bytes; `other`: the rank that the owner exchanges with.
  constexpr int64_t slot(int owner, int other, int lane, uint64_t number) const {
    return (queue(owner, other, lane) * kSlots + static_cast<int64_t>(number % kSlots)) *
           kSlotBytes;
  }
  constexpr int64_t state(int owner, int other, int lane) const {
    return queues() * kSlots * kSlotBytes +
           queue(owner, other, lane) * static_cast<int64_t>(sizeof(Queues));
  }

 private:
  constexpr int64_t queue(int owner, int other, int lane) const {
    return int64_t{(other - owner - 1 + size) % size} * lanes + lane;
  }
};

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
};

struct Arguments {
  Layout layout;
  int rank;
  std::byte* mailboxes[kMaxRanks];  ///< of all ranks, as this GPU sees them
  const int* aborted;               ///< in host memory: not 0 ends the kernel early
  int num_transfers;
  Rows transfers[kMaxTransfers];
};

/// Lanes between any two of `size` ranks.
int lanes_for(int size);

/// Moves all rows, on `stream`. The other ranks launch the same number of transfers, with the same
/// rows between any two. Throws std::runtime_error when the launch fails.
void launch_exchange(const Arguments& arguments, cudaStream_t stream);

}  // namespace anabranch::peer
