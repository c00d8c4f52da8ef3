// Every collective against values computed from the numbers of the ranks alone.
#include <anabranch/communicator.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <deque>
#include <limits>
#include <memory>
#include <numeric>
#include <thread>

#include "communicator/mpi/mpi.h"
#include "support/counts.h"
#include "support/devices.h"
#include "support/random.h"
#include "support/tolerance.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

const std::vector<torch::Dtype> kDtypes = {torch::kFloat32, torch::kFloat64, torch::kBFloat16,
                                           torch::kFloat16, torch::kInt64,   torch::kInt32};

Counts everything_to(int rank, int size, int64_t rows) {
  Counts counts(size, std::vector<int64_t>(size, 0));
  for (auto& row : counts) {
    row[rank] = rows;
  }
  return counts;
}

/// Rows of small whole numbers, exact in every type, that tell where each element came from,
/// [Σ count, columns], for the given (source, destination, count) one after another.
torch::Tensor marked_rows(const std::vector<std::array<int64_t, 3>>& blocks, int64_t columns,
                          torch::Dtype dtype) {
  std::vector<torch::Tensor> marks = {torch::empty({0, columns}, dtype)};
  for (const auto& [source, destination, count] : blocks) {
    const auto row = torch::arange(count).unsqueeze(1) * 7 + source * 53 + destination * 31;
    marks.push_back(((row + torch::arange(columns) * 3) % 251 - 125).to(dtype));
  }
  return torch::cat(marks);
}

struct Expected {
  Transfer transfer;
  torch::Tensor received;
};

Expected make_transfer(const Communicator& communicator, const Counts& counts, int64_t columns,
                       torch::Dtype dtype) {
  const int rank = communicator.rank();
  std::vector<std::array<int64_t, 3>> sent;
  std::vector<std::array<int64_t, 3>> received;
  Expected expected;
  for (int peer = 0; peer < communicator.size(); ++peer) {
    expected.transfer.send_rows.push_back(counts[rank][peer]);
    expected.transfer.receive_rows.push_back(counts[peer][rank]);
    sent.push_back({rank, peer, counts[rank][peer]});
    received.push_back({peer, rank, counts[peer][rank]});
  }
  expected.transfer.send = on_device(marked_rows(sent, columns, dtype));
  expected.received = on_device(marked_rows(received, columns, dtype));
  expected.transfer.receive = torch::full_like(expected.received, 126);  // no mark
  return expected;
}

void check_all_to_all(Communicator& communicator, const std::vector<Expected>& expected) {
  std::vector<Transfer> transfers;
  for (const Expected& one : expected) {
    transfers.push_back(one.transfer);
  }
  communicator.all_to_all_v(transfers);
  for (const Expected& one : expected) {
    EXPECT_TRUE(identical(one.transfer.receive, one.received));
  }
}

TEST(AllToAllV, MovesRandomCountsOfEveryType) {
  Random random(test_seed());
  for (const auto dtype : kDtypes) {
    for (int64_t i = 0; i < effort(5); ++i) {
      const Counts counts = random_counts(random, world()->size(), 20);
      check_all_to_all(*world(), {make_transfer(*world(), counts, random.integer(1, 9), dtype)});
    }
  }
}

TEST(AllToAllV, MovesEverythingToOneRankAndNothingAtAll) {
  for (int target = 0; target < world()->size(); ++target) {
    for (const int64_t rows : {0, 1, 300}) {
      const Counts counts = everything_to(target, world()->size(), rows);
      check_all_to_all(*world(), {make_transfer(*world(), counts, 5, torch::kFloat32)});
    }
  }
  check_all_to_all(*world(), {});
}

TEST(AllToAllV, MovesLargeRows) {
  Random random(test_seed());
  const Counts counts = random_counts(random, world()->size(), 40);
  check_all_to_all(*world(), {make_transfer(*world(), counts, 20'000, torch::kFloat32)});
}

TEST(AllToAllV, MovesMoreThanIsKeptOnTheWay) {
  Random random(test_seed());
  const Counts counts = random_counts(random, world()->size(), 1000);
  check_all_to_all(*world(), {make_transfer(*world(), counts, 4096, torch::kFloat32),
                              make_transfer(*world(), counts, 1001, torch::kBFloat16)});
}

/// Rank s sends rows of a table that only it has, any number of times.
TEST(AllToAllV, GathersTheRowsOfAnIndex) {
  constexpr int64_t kTable = 50;
  const int size = world()->size();
  const int rank = world()->rank();
  Random random(test_seed());
  for (const int64_t columns : {1, 7, 8, 500, 1024, 40'000}) {
    for (const auto dtype : kDtypes) {
      const Counts counts = random_counts(random, size, columns > 10'000 ? 40 : 400);
      Expected expected = make_transfer(*world(), counts, columns, dtype);
      std::vector<torch::Tensor> arriving;
      for (int source = 0; source < size; ++source) {
        const auto table = marked_rows({{source, 0, kTable}}, columns, dtype);
        const auto total =
            std::accumulate(counts[source].begin(), counts[source].end(), int64_t{0});
        const auto index = (random.uniform({total}) * kTable).to(torch::kInt64);
        arriving.push_back(
            table.index_select(0, index.split_with_sizes(counts[source])[rank].contiguous()));
        if (source == rank) {
          expected.transfer.send = on_device(table);
          expected.transfer.send_index = on_device(index);
        }
      }
      expected.received = on_device(torch::cat(arriving));
      check_all_to_all(*world(), {expected, make_transfer(*world(), counts, 3, torch::kFloat32)});
    }
  }
}

/// Up to four under way, of ranks that come and go at their own pace, and other collectives in between.
TEST(AllToAllV, GoesOnBesideWhatTheCallerDoes) {
  struct UnderWay {
    Expected expected;
    std::unique_ptr<Pending> pending;
  };
  Random random(test_seed());
  Random pace(test_seed() + static_cast<uint64_t>(world()->rank()));
  std::deque<UnderWay> under_way;
  const auto finish_oldest = [&] {
    under_way.front().pending->finish();
    EXPECT_TRUE(identical(under_way.front().expected.transfer.receive,
                          under_way.front().expected.received));
    under_way.pop_front();
  };
  for (int64_t step = effort(60); step > 0; --step) {
    const int64_t columns = random.pick<int64_t>({1, 300, 20'000});
    const Counts counts = random_counts(random, world()->size(), 60);
    UnderWay next{make_transfer(*world(), counts, columns, random.pick(kDtypes)), nullptr};
    next.pending = world()->start_all_to_all_v({next.expected.transfer});
    under_way.push_back(std::move(next));
    std::this_thread::sleep_for(std::chrono::microseconds(pace.integer(0, 3000)));
    if (random.chance(0.3)) {
      auto sum = on_device(torch::full({2}, world()->rank() + 1));
      world()->all_reduce(sum);
      EXPECT_EQ(sum[0].item<int64_t>(), world()->size() * (world()->size() + 1) / 2);
    }
    while (under_way.size() == 4 || (!under_way.empty() && random.chance())) {
      finish_oldest();
    }
  }
  while (!under_way.empty()) {
    finish_oldest();
  }
}

TEST(AllToAllV, MovesSeveralTransfersAtOnce) {
  Random random(test_seed());
  for (int64_t i = 0; i < effort(10); ++i) {
    std::vector<Expected> transfers;
    for (int64_t t = random.integer(1, 9); t > 0; --t) {
      transfers.push_back(make_transfer(*world(), random_counts(random, world()->size(), 10),
                                        random.integer(1, 2000), random.pick(kDtypes)));
    }
    check_all_to_all(*world(), transfers);
  }
}

TEST(AllToAllV, MovesRowsOfAnyShape) {
  const int size = world()->size();
  const std::vector<int64_t> rows(size, 2);
  for (const std::vector<int64_t>& shape : {std::vector<int64_t>{}, {3, 4}, {0}, {2, 1, 5}}) {
    std::vector<int64_t> sizes = {2 * size};
    sizes.insert(sizes.end(), shape.begin(), shape.end());
    const auto send = on_device(torch::full(sizes, world()->rank(), torch::kFloat32));
    const auto receive = torch::full_like(send, -1.0F);
    world()->all_to_all_v({{send, rows, receive, rows}});
    for (int peer = 0; peer < size; ++peer) {
      EXPECT_TRUE(receive.narrow(0, 2 * peer, 2).eq(peer).all().item<bool>());
    }
  }
}

TEST(AllToAllV, CutsLongMessagesIntoPieces) {
  if (world()->name() != "mpi") {
    GTEST_SKIP() << "pieces are MPI's";
  }
  Random random(test_seed());
  for (const int64_t piece_bytes : {1, 24, 64, 4096}) {
    const auto communicator = make_mpi_communicator({}, piece_bytes);
    // Rows shorter and longer than a piece, and messages of whole pieces.
    check_all_to_all(
        *communicator,
        {make_transfer(*communicator, random_counts(random, world()->size(), 9), 3,
                       torch::kFloat64),
         make_transfer(*communicator, everything_to(0, world()->size(), 8), 2, torch::kInt32),
         make_transfer(*communicator, random_counts(random, world()->size(), 3), 40,
                       torch::kBFloat16)});
    auto sum = on_device(torch::full({100}, communicator->rank() + 1));
    communicator->all_reduce(sum);
    EXPECT_TRUE(sum.eq(world()->size() * (world()->size() + 1) / 2).all().item<bool>());
  }
}

/// What rank `rank` brings to a sum; the same for whoever asks.
torch::Tensor term(int rank, int64_t elements, torch::Dtype dtype) {
  Random random(test_seed() + static_cast<uint64_t>(1000 * elements + rank));
  return torch::isIntegralType(dtype, false)
             ? random.permutation(std::max<int64_t>(elements, 1)).narrow(0, 0, elements).to(dtype)
             : random.normal({elements}, dtype);
}

/// One element after another, in rank order; 16-bit types rounded once.
torch::Tensor sum_of_terms(int size, int64_t elements, torch::Dtype dtype) {
  const auto accumulation = torch::isIntegralType(dtype, false) ? dtype : accumulation_type(dtype);
  torch::Tensor sum = term(0, elements, dtype).to(accumulation);
  for (int rank = 1; rank < size; ++rank) {
    sum = sum + term(rank, elements, dtype).to(accumulation);
  }
  return sum.to(dtype);
}

TEST(AllReduce, SumsInRankOrderAndRoundsOnce) {
  for (const auto dtype : kDtypes) {
    for (const int64_t elements : {0, 1, 2, 3, 4, 5, 1000, 70'001}) {
      auto tensor = on_device(term(world()->rank(), elements, dtype));
      world()->all_reduce(tensor);
      EXPECT_TRUE(identical(tensor, sum_of_terms(world()->size(), elements, dtype)))
          << to_string(dtype) << ", " << elements << " elements";
    }
  }
}

TEST(AllReduce, KeepsWholeNumbersExact) {
  const int64_t large = (int64_t{1} << 53) + 1;  // no double
  auto tensor = on_device(torch::full({2, 3}, large, torch::kInt64));
  world()->all_reduce(tensor);
  EXPECT_TRUE(tensor.eq(large * world()->size()).all().item<bool>());
}

TEST(AllReduce, AgreesBitForBitOverRunsAndRanks) {
  for (const auto dtype : {torch::kFloat32, torch::kBFloat16}) {
    auto first = on_device(term(world()->rank(), 5000, dtype));
    auto second = first.clone();
    world()->all_reduce(first);
    world()->all_reduce(second);
    EXPECT_TRUE(identical(first, second));
    const auto gathered = world()->all_gather(first);
    for (int rank = 0; rank < world()->size(); ++rank) {
      EXPECT_TRUE(identical(gathered[rank], first));
    }
  }
}

TEST(AllReduce, TakesParameters) {
  auto parameter = on_device(torch::ones({3, 5})).requires_grad_();
  world()->all_reduce(parameter);
  EXPECT_TRUE(parameter.eq(world()->size()).all().item<bool>());
  EXPECT_TRUE(parameter.is_leaf() && parameter.requires_grad());
}

TEST(AllGather, CollectsEveryTypeAndShape) {
  for (const auto dtype : kDtypes) {
    for (const std::vector<int64_t>& shape :
         {std::vector<int64_t>{}, {0}, {1}, {3, 4}, {2, 0, 3}, {50'000}}) {
      const auto gathered =
          world()->all_gather(on_device(torch::full(shape, world()->rank() + 1, dtype)));
      ASSERT_EQ(gathered.dim(), static_cast<int64_t>(shape.size()) + 1);
      ASSERT_EQ(gathered.size(0), world()->size());
      for (int rank = 0; rank < world()->size(); ++rank) {
        EXPECT_TRUE(identical(gathered[rank], torch::full(shape, rank + 1, dtype)));
      }
    }
  }
}

TEST(Broadcast, OverwritesWithTheRootsTensor) {
  for (const auto dtype : kDtypes) {
    for (int root = 0; root < world()->size(); ++root) {
      for (const int64_t elements : {0, 1, 40'000}) {
        auto tensor = on_device(torch::full({elements, 2}, world()->rank(), dtype));
        world()->broadcast(tensor, root);
        EXPECT_TRUE(identical(tensor, torch::full({elements, 2}, root, dtype)));
      }
    }
  }
}

// Agreements, counts and checkpoints travel in host memory, whatever the layer computes on.
TEST(HostMemory, IsMovedByEveryCommunicator) {
  const auto rank = world()->rank();
  const auto size = world()->size();
  const auto gathered = world()->all_gather(torch::full({3}, rank, torch::kInt64));
  for (int peer = 0; peer < size; ++peer) {
    EXPECT_TRUE(gathered[peer].eq(peer).all().item<bool>());
  }
  auto sum = torch::ones({5}, torch::kFloat64);
  world()->all_reduce(sum);
  EXPECT_TRUE(sum.eq(size).all().item<bool>());
  auto token = torch::full({2}, rank, torch::kFloat32);
  world()->broadcast(token, size - 1);
  EXPECT_TRUE(token.eq(size - 1).all().item<bool>());
  const std::vector<int64_t> rows(size, 1);
  const auto send = torch::full({size, 2}, rank, torch::kFloat32);
  const auto receive = torch::full_like(send, -1);
  world()->all_to_all_v({{send, rows, receive, rows}});
  for (int peer = 0; peer < size; ++peer) {
    EXPECT_TRUE(receive[peer].eq(peer).all().item<bool>());
  }
  world()->check();
}

TEST(Barrier, NobodyLeavesBeforeAllHaveCome) {
  using Clock = std::chrono::steady_clock;
  const auto now = [] { return int64_t{Clock::now().time_since_epoch().count()}; };
  for (int last = 0; last < world()->size(); ++last) {
    if (world()->rank() == last) {
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
    }
    const int64_t came = now();
    world()->barrier();
    const int64_t left = now();
    const auto times = world()->all_gather(torch::tensor({came, left}, torch::kInt64));
    EXPECT_LE(times.select(1, 0).max().item<int64_t>(), times.select(1, 1).min().item<int64_t>());
  }
}

}  // namespace
}  // namespace anabranch::test
