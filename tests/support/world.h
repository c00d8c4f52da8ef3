#pragma once

#include <anabranch/parameters.h>

#include <cstdint>
#include <memory>

namespace anabranch::test {

/// Every rank this program was started on: MPI's under mpirun, otherwise this process alone. After
/// a test that failed on any rank the next one gets a fresh communicator.
std::shared_ptr<Communicator> world();

/// make_parallel_groups(world(), expert_parallel_size), made once: NCCL takes a second for each.
const ParallelGroups& parallel_groups(int64_t expert_parallel_size = 0);

/// Seed of the whole run, equal on every rank: --seed, ANABRANCH_TEST_SEED, or fresh. Printed first.
uint64_t seed();

/// Seed of the running test: from `seed()` and the test's name, so that a test run alone with the
/// printed seed draws the same numbers.
uint64_t test_seed();

/// How many of `count` random cases to run: all of them, or the share ANABRANCH_TEST_EFFORT asks for
/// (0.25 under a sanitizer, 10 for a soak), at least one.
int64_t effort(int64_t count);

}  // namespace anabranch::test

/// Skips the test on every rank unless it runs on at least that many.
#define ANABRANCH_NEEDS_RANKS(count)                  \
  if (::anabranch::test::world()->size() < (count)) { \
    GTEST_SKIP() << "needs " << (count) << " ranks";  \
  }                                                   \
  static_assert(true, "")
