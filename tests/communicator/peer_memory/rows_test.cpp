// The kernel that moves rows through peers' memory, run by threads of the host: each of a block's
// threads is one. What is checked is who waits for whom, who writes where, and that every row
// arrives; under ThreadSanitizer also that nothing is read before it was written. On GPUs
// communicator_test checks it, with `--communicator peer_memory`.
#include <gtest/gtest.h>
#include <vector_types.h>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "support/counts.h"
#include "support/random.h"
#include "support/world.h"

// What CUDA's compiler knows by itself.
namespace {

struct Index {
  unsigned x = 0;
};
thread_local Index threadIdx;  // NOLINT(readability-identifier-naming)
thread_local Index blockIdx;   // NOLINT(readability-identifier-naming)
thread_local Index blockDim;   // NOLINT(readability-identifier-naming)
thread_local Index gridDim;    // NOLINT(readability-identifier-naming)

struct Block {
  explicit Block(std::ptrdiff_t threads) : barrier(threads) {}
  std::barrier<> barrier;
  bool waited = false;
};
thread_local Block* block = nullptr;

void __syncthreads() { block->barrier.arrive_and_wait(); }  // NOLINT

template <typename word_t>
word_t __ldcg(const word_t* address) {  // NOLINT
  return *address;
}

}  // namespace

#include "communicator/peer_memory/rows.cuh"

namespace anabranch::peer {
namespace {

using anabranch::test::Counts;
using anabranch::test::effort;
using anabranch::test::Random;
using anabranch::test::random_counts;
using anabranch::test::test_seed;

constexpr unsigned kThreads = 2 * kWarp;
constexpr unsigned kOwnBlocks = 2;
constexpr auto kPoison = std::byte{0xEE};

struct Mailbox {
  explicit Mailbox(const Layout& layout)
      : layout(layout), memory(new (std::align_val_t{alignof(Queues)}) std::byte[layout.bytes()]) {
    std::memset(memory.get(), 0, layout.bytes());
  }
  struct Free {
    void operator()(std::byte* memory) const {
      ::operator delete[](memory, std::align_val_t{alignof(Queues)});
    }
  };
  Layout layout;
  std::unique_ptr<std::byte[], Free> memory;
};

std::vector<std::byte> random_bytes(Random& random, int64_t size) {
  std::vector<std::byte> bytes(size);
  for (auto& byte : bytes) {
    byte = static_cast<std::byte>(random.next());
  }
  return bytes;
}

/// One buffer of all ranks.
class Buffer {
 public:
  /// `told`: the kernel reads the counts where the host does not know them.
  Buffer(Random& random, const Counts& counts, int64_t row_bytes, bool gathers, bool told = false)
      : counts_(counts) {
    const auto ranks = static_cast<int>(counts.size());
    for (int rank = 0; rank < ranks; ++rank) {
      Rows rows = {};
      rows.row_bytes = row_bytes;
      int64_t sent = 0;
      int64_t received = 0;
      for (int other = 0; other < ranks; ++other) {
        rows.send_begin[other] = sent;
        rows.receive_begin[other] = received;
        sent += rows.send_rows[other] = counts[rank][other];
        received += rows.receive_rows[other] = counts[other][rank];
      }
      const int64_t held = gathers ? random.integer(1, 20) : sent;
      sources_.push_back(random_bytes(random, held * row_bytes));
      // The last byte is nobody's.
      targets_.emplace_back(received * row_bytes + 1, kPoison);
      indices_.emplace_back();
      for (int64_t row = 0; row < sent; ++row) {
        indices_.back().push_back(gathers ? random.integer(0, held - 1) : row);
      }
      rows_.push_back(rows);
    }
    for (int rank = 0; rank < ranks; ++rank) {
      rows_[rank].source = sources_[rank].data();
      rows_[rank].target = targets_[rank].data();
      rows_[rank].index = gathers ? indices_[rank].data() : nullptr;
    }
    for (int rank = 0; told && rank < ranks; ++rank) {
      told_.push_back(counts[rank]);
      for (int other = 0; other < ranks; ++other) {
        told_.back().push_back(counts[other][rank]);
      }
    }
  }

  Rows of(int rank) const {
    Rows rows = rows_[rank];
    if (!told_.empty()) {
      rows.counts = told_[rank].data();
      for (auto* unknown :
           {rows.send_begin, rows.send_rows, rows.receive_begin, rows.receive_rows}) {
        std::fill_n(unknown, kMaxRanks, int64_t{1} << 40);
      }
    }
    return rows;
  }

  void expect_arrived() const {
    const auto ranks = static_cast<int>(rows_.size());
    for (int rank = 0; rank < ranks; ++rank) {
      std::vector<std::byte> expected;
      for (int source = 0; source < ranks; ++source) {
        const Rows& from = rows_[source];
        for (int64_t i = 0; i < counts_[source][rank]; ++i) {
          const int64_t row = indices_[source][from.send_begin[rank] + i];
          const auto begin = sources_[source].begin() + row * from.row_bytes;
          expected.insert(expected.end(), begin, begin + from.row_bytes);
        }
      }
      expected.push_back(kPoison);
      EXPECT_TRUE(targets_[rank] == expected) << "rank " << rank;
    }
  }

 private:
  Counts counts_;
  std::vector<std::vector<std::byte>> sources_, targets_;
  std::vector<std::vector<int64_t>> indices_, told_;
  std::vector<Rows> rows_;
};

/// Ranks that exchange through one process's memory.
class Ranks {
 public:
  Ranks(int ranks, int lanes) : layout_{ranks, lanes} {
    for (int rank = 0; rank < ranks; ++rank) {
      mailboxes_.emplace_back(layout_);
    }
  }

  /// Starts the blocks of `rank`, which moves its part of the buffers.
  void start(int rank, const std::vector<const Buffer*>& buffers) {
    auto arguments = std::make_shared<Arguments>();
    arguments->layout = layout_;
    arguments->rank = rank;
    arguments->aborted = &aborted;
    for (size_t other = 0; other < mailboxes_.size(); ++other) {
      arguments->mailboxes[other] = mailboxes_[other].memory.get();
    }
    bool counted = false;
    for (const Buffer* buffer : buffers) {
      arguments->transfers[arguments->num_transfers++] = buffer->of(rank);
      counted = counted || buffer->of(rank).counts != nullptr;
    }
    const unsigned blocks = lane_blocks(layout_) + kOwnBlocks;
    for (unsigned number = 0; number < blocks; ++number) {
      const auto shared = std::make_shared<Block>(kThreads);
      for (unsigned thread = 0; thread < kThreads; ++thread) {
        threads_.emplace_back([=] {
          block = shared.get();
          blockIdx.x = number;
          threadIdx.x = thread;
          blockDim.x = kThreads;
          gridDim.x = blocks;
          counted ? exchange<true>(*arguments, shared->waited)
                  : exchange<false>(*arguments, shared->waited);
        });
      }
    }
  }
  void join() { threads_.clear(); }

  int aborted = 0;

 private:
  Layout layout_;
  std::vector<Mailbox> mailboxes_;
  std::vector<std::jthread> threads_;
};

/// Rows of bytes, of words, as long as a slot and longer; some so many that slots are used again.
int64_t random_row_bytes(Random& random) {
  return random.pick<int64_t>({1, 4, 6, 16, random.integer(1, 300), 16 * random.integer(1, 100),
                               kSlotBytes, 2 * kSlotBytes + 48, kSlotBytes + 4});
}

TEST(PeerRows, ArriveWhateverTheirNumberAndSize) {
  Random random(test_seed());
  for (int ranks = 1; ranks <= 4; ++ranks) {
    Ranks world(ranks, static_cast<int>(random.integer(1, 2)));
    // The queues go on where the last launch has left them.
    for (int64_t launch = 0; launch < effort(2); ++launch) {
      std::vector<std::unique_ptr<Buffer>> buffers;
      std::vector<const Buffer*> all;
      for (int64_t i = random.integer(1, kMaxTransfers); i > 0; --i) {
        const int64_t bytes = random_row_bytes(random);
        const int64_t largest = std::min<int64_t>(400, 10 * kSlotBytes / bytes);
        buffers.push_back(std::make_unique<Buffer>(random, random_counts(random, ranks, largest),
                                                   bytes, random.chance(), random.chance()));
        all.push_back(buffers.back().get());
      }
      for (int rank = 0; rank < ranks; ++rank) {
        world.start(rank, all);
      }
      world.join();
      for (const auto& buffer : buffers) {
        buffer->expect_arrived();
      }
    }
  }
}

TEST(PeerRows, EndWithoutAPeerWhenAborted) {
  Random random(test_seed());
  Ranks world(2, 1);
  const Buffer buffer(random, {{3, 1000}, {1000, 2}}, 4096, /*gathers=*/false);
  world.start(0, {&buffer});  // rank 1 never comes
  std::atomic_ref<int>(world.aborted).store(1);
  world.join();
}

}  // namespace
}  // namespace anabranch::peer
