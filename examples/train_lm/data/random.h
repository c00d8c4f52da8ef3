#pragma once

#include <torch/types.h>

#include <cstdint>

namespace train_lm {

/// A CPU generator for one purpose, `stream`, and one item of it: the same numbers on every rank
/// and at any number of ranks, whatever else has drawn random numbers.
enum class Stream : uint64_t {
  kParameter,
  kExperts,
  kBatch,
  kSample,
  kHeldOut,
  kOrder,
  kEpoch,
  kRouting
};

/// SplitMix64's finalizer (Steele, Lea and Flood 2014): every bit depends on all of `bits`.
uint64_t mixed_bits(uint64_t bits);

/// A seed mixed from its three parts, all of whose bits depend on all of theirs.
uint64_t mixed_seed(uint64_t seed, Stream stream, uint64_t item);

at::Generator make_generator(uint64_t seed, Stream stream, uint64_t item);

}  // namespace train_lm
