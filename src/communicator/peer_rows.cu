#include <algorithm>

#include "communicator/chunks.h"
#include "communicator/peer_rows.h"
#include "support/cuda_check.h"

namespace anabranch::peer {
namespace {

constexpr int kWarp = 32;
/// Half of a block's threads send, the other half receive.
constexpr int kHalf = 256;
constexpr int kThreads = 2 * kHalf;
/// Blocks that talk to other ranks, about; one alone does not fill a link.
constexpr int kLanesOfAll = 32;
/// Blocks that move a rank's own rows.
constexpr int kOwnBlocks = 24;
/// How often a waiting thread looks at a flag before it looks whether it waits in vain.
constexpr int kPatience = 1024;

__device__ __forceinline__ uint64_t load_acquire(const uint64_t* flag) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(flag) : "memory");
  return value;
}

__device__ __forceinline__ void store_release(uint64_t* flag, uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
}

__device__ __forceinline__ void sync_half(int half) {
  asm volatile("bar.sync %0, %1;" ::"r"(half + 1), "n"(kHalf) : "memory");
}

/// False if it waited in vain.
__device__ bool wait_for(const uint64_t* flag, uint64_t least, const int* aborted) {
  for (int looked = 1; load_acquire(flag) < least; ++looked) {
    if (looked % kPatience == 0 && *static_cast<const volatile int*>(aborted) != 0) {
      return false;
    }
  }
  return true;
}

/// By `threads` threads, of which this is one. Reads past the first cache, which does not see what
/// other GPUs write.
template <typename word_t, int kUnroll>
__device__ __forceinline__ void copy_words(std::byte* target, const std::byte* source,
                                           int64_t bytes, int thread, int threads) {
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
  const int64_t done = words * static_cast<int64_t>(sizeof(word_t));
  const auto* rest = reinterpret_cast<const unsigned char*>(source);
  for (int64_t byte = done + thread; byte < bytes; byte += threads) {
    reinterpret_cast<unsigned char*>(target)[byte] = __ldcg(rest + byte);
  }
}

__device__ void copy(std::byte* target, const std::byte* source, int64_t bytes, int thread,
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

/// Bytes [offset, offset + bytes) of `count` rows from `row` on.
struct Piece {
  int64_t row;
  int64_t count;
  int64_t offset;
  int64_t bytes;
};

/// Gathers a piece of the rows from `begin` on, one after another, to `target`.
__device__ void gather(const Rows& rows, int64_t begin, const Piece& piece, std::byte* target,
                       int thread, int threads) {
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

/// One lane between this rank and another: what both halves of a block know.
struct Lane {
  const Arguments& arguments;
  int peer;
  int lane;
  bool* waited;  ///< whether the half goes on, for its threads to see

  __device__ Queues& queues(int owner, int other) const {
    return *reinterpret_cast<Queues*>(arguments.mailboxes[owner] +
                                      arguments.layout.state(other, lane));
  }
  __device__ std::byte* slot(int owner, int other, uint64_t number) const {
    return arguments.mailboxes[owner] + arguments.layout.slot(other, lane, number);
  }
  /// All threads of a half return when the flag has come so far; false if it waited in vain.
  __device__ bool wait(const uint64_t* flag, uint64_t least, int half, int thread) const {
    if (thread == 0) {
      *waited = wait_for(flag, least, arguments.aborted);
    }
    sync_half(half);
    return *waited;
  }
};

__device__ void send(const Lane& lane, int thread) {
  const Arguments& arguments = lane.arguments;
  Queues& own = lane.queues(arguments.rank, lane.peer);
  Queues& others = lane.queues(lane.peer, arguments.rank);
  const uint64_t sent_before = own.sent;
  uint64_t sent = sent_before;
  for (int i = 0; i < arguments.num_transfers; ++i) {
    const Rows& rows = arguments.transfers[i];
    const auto fill = [&](const Piece& piece) {
      if (!lane.wait(&own.emptied, sent < kSlots ? 0 : sent + 1 - kSlots, 0, thread)) {
        return false;
      }
      gather(rows, rows.send_begin[lane.peer], piece, lane.slot(lane.peer, arguments.rank, sent),
             thread, kHalf);
      ++sent;
      sync_half(0);
      if (thread == 0) {
        store_release(&others.filled, sent);
      }
      return true;
    };
    if (!for_each_piece(rows.send_rows[lane.peer], rows.row_bytes, lane.lane,
                        arguments.layout.lanes, fill)) {
      return;
    }
  }
  if (thread == 0 && sent > sent_before) {  // then all threads have read it
    own.sent = sent;
  }
}

__device__ void receive(const Lane& lane, int thread) {
  const Arguments& arguments = lane.arguments;
  Queues& own = lane.queues(arguments.rank, lane.peer);
  Queues& others = lane.queues(lane.peer, arguments.rank);
  const uint64_t received_before = own.received;
  uint64_t received = received_before;
  for (int i = 0; i < arguments.num_transfers; ++i) {
    const Rows& rows = arguments.transfers[i];
    const auto empty = [&](const Piece& piece) {
      if (!lane.wait(&own.filled, received + 1, 1, thread)) {
        return false;
      }
      std::byte* target =
          rows.target + (rows.receive_begin[lane.peer] + piece.row) * rows.row_bytes + piece.offset;
      copy(target, lane.slot(arguments.rank, lane.peer, received), piece.count * piece.bytes,
           thread, kHalf);
      ++received;
      sync_half(1);
      if (thread == 0) {
        store_release(&others.emptied, received);
      }
      return true;
    };
    if (!for_each_piece(rows.receive_rows[lane.peer], rows.row_bytes, lane.lane,
                        arguments.layout.lanes, empty)) {
      return;
    }
  }
  if (thread == 0 && received > received_before) {  // then all threads have read it
    own.received = received;
  }
}

/// What a rank sends itself: of each transfer a part for each of `blocks`.
__device__ void move_own(const Arguments& arguments, int block, int blocks) {
  for (int i = 0; i < arguments.num_transfers; ++i) {
    const Rows& rows = arguments.transfers[i];
    const int64_t count = rows.send_rows[arguments.rank];
    const int64_t begin = chunk_begin(count, block, blocks);
    const Piece piece{begin, chunk_begin(count, block + 1, blocks) - begin, 0, rows.row_bytes};
    gather(rows, rows.send_begin[arguments.rank], piece,
           rows.target + (rows.receive_begin[arguments.rank] + begin) * rows.row_bytes, threadIdx.x,
           kThreads);
  }
}

__global__ void __launch_bounds__(kThreads)
    exchange_kernel(const __grid_constant__ Arguments arguments) {
  __shared__ bool waited[2];
  const Layout& layout = arguments.layout;
  const int others = layout.size - 1;
  const int lanes = others * layout.lanes;
  const int block = static_cast<int>(blockIdx.x);
  if (block >= lanes) {
    move_own(arguments, block - lanes, static_cast<int>(gridDim.x) - lanes);
    return;
  }
  const int half = static_cast<int>(threadIdx.x) / kHalf;
  const int thread = static_cast<int>(threadIdx.x) % kHalf;
  const int peer = (arguments.rank + 1 + block % others) % layout.size;
  const Lane lane{arguments, peer, block / others, &waited[half]};
  if (half == 0) {
    send(lane, thread);
  } else {
    receive(lane, thread);
  }
}

}  // namespace

int lanes_for(int size) { return std::max(1, kLanesOfAll / std::max(1, size - 1)); }

void launch_exchange(const Arguments& arguments, cudaStream_t stream) {
  int64_t own = 0;
  for (int i = 0; i < arguments.num_transfers; ++i) {
    own += arguments.transfers[i].send_rows[arguments.rank];
  }
  const int lanes = (arguments.layout.size - 1) * arguments.layout.lanes;
  const int blocks = lanes + (own > 0 ? kOwnBlocks : 0);
  exchange_kernel<<<blocks, kThreads, 0, stream>>>(arguments);
  check_launch("exchange rows by peers' memory");
}

}  // namespace anabranch::peer
