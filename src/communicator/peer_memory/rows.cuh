#pragma once

#include <cuda/atomic>

#include "communicator/chunks.h"
#include "communicator/peer_memory/rows.h"

// The kernel of rows.h, without its launch: so the tests can run it on the host's threads.

namespace anabranch::peer {

constexpr int kWarp = 32;
/// How often a waiting thread looks at a counter before it looks whether it waits in vain.
constexpr int kPatience = 1024;

using Counter = cuda::atomic_ref<uint64_t, cuda::thread_scope_system>;

/// By `threads` threads, of which this is one. Reads past the first cache, which does not see what
/// other GPUs write.
template <typename word_t, int kUnroll>
__device__ inline void copy_words(std::byte* target, const std::byte* source, int64_t bytes,
                                  int thread, int threads) {
  const int64_t words = bytes / static_cast<int64_t>(sizeof(word_t));
  const auto* from = reinterpret_cast<const word_t*>(source);
  auto* to = reinterpret_cast<word_t*>(target);
  int64_t i = thread;
  for (; i + (kUnroll - 1) * threads < words; i += kUnroll * threads) {
    word_t word[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      word[j] = __ldcg(from + i + j * threads);
    }
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      to[i + j * threads] = word[j];
    }
  }
  for (; i < words; i += threads) {
    to[i] = __ldcg(from + i);
  }
  const auto* rest = reinterpret_cast<const unsigned char*>(source);
  for (int64_t byte = words * static_cast<int64_t>(sizeof(word_t)) + thread; byte < bytes;
       byte += threads) {
    reinterpret_cast<unsigned char*>(target)[byte] = __ldcg(rest + byte);
  }
}

__device__ inline void copy(std::byte* target, const std::byte* source, int64_t bytes, int thread,
                            int threads) {
  const auto places = reinterpret_cast<uintptr_t>(target) | reinterpret_cast<uintptr_t>(source);
  if (places % 16 == 0) {
    copy_words<uint4, 8>(target, source, bytes, thread, threads);
  } else if (places % 4 == 0) {
    copy_words<unsigned, 4>(target, source, bytes, thread, threads);
  } else if (places % 2 == 0) {
    copy_words<unsigned short, 4>(target, source, bytes, thread, threads);
  } else {
    copy_words<unsigned char, 4>(target, source, bytes, thread, threads);
  }
}

/// Rows from `begin` on.
struct Range {
  int64_t begin;
  int64_t count;
};

__device__ inline Range range_in(const int64_t* counts, int rank) {
  int64_t begin = 0;
  for (int before = 0; before < rank; ++before) {
    begin += counts[before];
  }
  return {begin, counts[rank]};
}

/// With `kCounted` the host did not know them.
template <bool kCounted>
__device__ inline Range sent_to(const Rows& rows, int rank) {
  if constexpr (kCounted) {
    if (rows.counts != nullptr) return range_in(rows.counts, rank);
  }
  return {rows.send_begin[rank], rows.send_rows[rank]};
}

/// Of `size` ranks.
template <bool kCounted>
__device__ inline Range received_from(const Rows& rows, int rank, int size) {
  if constexpr (kCounted) {
    if (rows.counts != nullptr) return range_in(rows.counts + size, rank);
  }
  return {rows.receive_begin[rank], rows.receive_rows[rank]};
}

/// Bytes [offset, offset + bytes) of `count` rows from `row` on.
struct Piece {
  int64_t row;
  int64_t count;
  int64_t offset;
  int64_t bytes;
};

/// The block gathers a piece of the rows from `begin` on, one after another, to `target`.
__device__ inline void gather(const Rows& rows, int64_t begin, const Piece& piece,
                              std::byte* target) {
  const auto thread = static_cast<int>(threadIdx.x);
  const auto threads = static_cast<int>(blockDim.x);
  if (rows.index == nullptr) {
    copy(target, rows.source + (begin + piece.row) * rows.row_bytes + piece.offset,
         piece.count * piece.bytes, thread, threads);
    return;
  }
  for (int64_t i = thread / kWarp; i < piece.count; i += threads / kWarp) {
    const int64_t row = rows.index[begin + piece.row + i];
    copy(target + i * piece.bytes, rows.source + row * rows.row_bytes + piece.offset, piece.bytes,
         thread % kWarp, kWarp);
  }
}

/// Calls `move` with the pieces of the rows that are a lane's, each filling a slot, until it returns
/// false. Both ends of a queue cut alike.
template <typename move_t>
__device__ bool for_each_piece(int64_t rows, int64_t row_bytes, int lane, int lanes,
                               const move_t& move) {
  const int64_t end = chunk_begin(rows, lane + 1, lanes);
  const int64_t bytes = row_bytes < kSlotBytes ? row_bytes : kSlotBytes;
  const int64_t together = kSlotBytes / bytes;
  for (int64_t row = chunk_begin(rows, lane, lanes); row < end; row += together) {
    const int64_t count = end - row < together ? end - row : together;
    for (int64_t offset = 0; offset < row_bytes; offset += bytes) {
      const int64_t left = row_bytes - offset;
      if (!move(Piece{row, count, offset, left < bytes ? left : bytes})) {
        return false;
      }
    }
  }
  return true;
}

/// One end of the queues of a lane between this rank and another, held by a block.
template <bool kCounted>
class Lane {
 public:
  /// `waited` is shared by the block's threads.
  __device__ Lane(const Arguments& arguments, int peer, int lane, bool& waited)
      : arguments_(arguments), peer_(peer), lane_(lane), waited_(waited) {}

  __device__ void send() const { run<true>(); }
  __device__ void receive() const { run<false>(); }

 private:
  /// Fills, or empties, one slot after another as the other end makes them free, or fills them.
  template <bool kSends>
  __device__ void run() const {
    Queues& own = queues(arguments_.rank, peer_);
    Queues& others = queues(peer_, arguments_.rank);
    uint64_t& kept = kSends ? own.sent : own.received;
    const uint64_t before = kept;
    uint64_t number = before;
    for (int i = 0; i < arguments_.num_transfers; ++i) {
      const Rows& rows = arguments_.transfers[i];
      const Range range = kSends ? sent_to<kCounted>(rows, peer_)
                                 : received_from<kCounted>(rows, peer_, arguments_.layout.size);
      const auto move = [&](const Piece& piece) {
        const uint64_t free = number < kSlots ? 0 : number + 1 - kSlots;
        if (!(kSends ? wait(own.emptied, free) : wait(own.filled, number + 1))) {
          return false;
        }
        if constexpr (kSends) {
          gather(rows, range.begin, piece, slot(peer_, arguments_.rank, number));
        } else {
          take(rows, range.begin, piece, slot(arguments_.rank, peer_, number));
        }
        say(kSends ? others.filled : others.emptied, ++number);
        return true;
      };
      if (!for_each_piece(range.count, rows.row_bytes, lane_, arguments_.layout.lanes, move)) {
        return;
      }
    }
    // For the next launch. Where the counter has moved, all threads have read it.
    if (threadIdx.x == 0 && number > before) {
      kept = number;
    }
  }

  __device__ void take(const Rows& rows, int64_t begin, const Piece& piece,
                       const std::byte* slot) const {
    copy(rows.target + (begin + piece.row) * rows.row_bytes + piece.offset, slot,
         piece.count * piece.bytes, static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x));
  }

  __device__ Queues& queues(int owner, int other) const {
    return *reinterpret_cast<Queues*>(arguments_.mailboxes[owner] +
                                      arguments_.layout.state(owner, other, lane_));
  }
  __device__ std::byte* slot(int owner, int other, uint64_t number) const {
    return arguments_.mailboxes[owner] + arguments_.layout.slot(owner, other, lane_, number);
  }

  /// All threads of the block return when the counter has come so far; false if it never will.
  __device__ bool wait(uint64_t& counter, uint64_t least) const {
    if (threadIdx.x == 0) {
      waited_ = true;
      for (int looked = 1; Counter(counter).load(cuda::std::memory_order_acquire) < least;
           ++looked) {
        if (looked % kPatience == 0 && *static_cast<const volatile int*>(arguments_.aborted) != 0) {
          waited_ = false;
          break;
        }
      }
    }
    __syncthreads();
    return waited_;
  }

  /// Tells whoever waits for the counter, when all threads have done what it stands for.
  __device__ void say(uint64_t& counter, uint64_t value) const {
    __syncthreads();
    if (threadIdx.x == 0) {
      Counter(counter).store(value, cuda::std::memory_order_release);
    }
  }

  const Arguments& arguments_;
  int peer_;
  int lane_;
  bool& waited_;
};

/// What a rank sends itself: of each transfer a part for each of `blocks`.
template <bool kCounted>
__device__ inline void move_own(const Arguments& arguments, int block, int blocks) {
  for (int i = 0; i < arguments.num_transfers; ++i) {
    const Rows& rows = arguments.transfers[i];
    const Range sent = sent_to<kCounted>(rows, arguments.rank);
    const Range received = received_from<kCounted>(rows, arguments.rank, arguments.layout.size);
    const int64_t begin = chunk_begin(sent.count, block, blocks);
    const Piece piece{begin, chunk_begin(sent.count, block + 1, blocks) - begin, 0, rows.row_bytes};
    gather(rows, sent.begin, piece, rows.target + (received.begin + begin) * rows.row_bytes);
  }
}

/// Blocks of all lanes, each with one to send and one to receive. More move the own rows.
__host__ __device__ constexpr int lane_blocks(const Layout& layout) {
  return 2 * (layout.size - 1) * layout.lanes;
}

/// What a block does. Neighbours serve different peers.
template <bool kCounted>
__device__ inline void exchange(const Arguments& arguments, bool& waited) {
  const Layout& layout = arguments.layout;
  const auto block = static_cast<int>(blockIdx.x);
  if (block >= lane_blocks(layout)) {
    move_own<kCounted>(arguments, block - lane_blocks(layout),
                       static_cast<int>(gridDim.x) - lane_blocks(layout));
    return;
  }
  const int others = layout.size - 1;
  const int peer = (arguments.rank + 1 + block / 2 % others) % layout.size;
  const Lane<kCounted> lane(arguments, peer, block / 2 / others, waited);
  if (block % 2 == 0) {
    lane.send();
  } else {
    lane.receive();
  }
}

}  // namespace anabranch::peer
