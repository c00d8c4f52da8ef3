#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define ANABRANCH_ANYWHERE __host__ __device__
#else
#define ANABRANCH_ANYWHERE
#endif

namespace anabranch {

/// 64 random bits for element `index` in step `step`: SplitMix64's finaliser, the same on every device.
ANABRANCH_ANYWHERE inline uint64_t noise_of(uint64_t seed, int64_t step, int64_t index) {
  uint64_t bits = seed ^ (static_cast<uint64_t>(step) * 0xd6e8feb86659fd93ULL);
  bits += (static_cast<uint64_t>(index) + 1) * 0x9e3779b97f4a7c15ULL;
  bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9ULL;
  bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebULL;
  return bits ^ (bits >> 31);
}

/// The upper half of an fp32 number's bits is a bf16 number. Rounds to one of the two neighbours, to the
/// nearer one more likely, so that the mean is exact: `noise` is uniform in 16 bits. Infinities and NaN
/// stay what they are.
ANABRANCH_ANYWHERE inline uint32_t round_stochastically(uint32_t bits, uint32_t noise) {
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  if (finite) return (bits + (noise & 0xffffu)) >> 16;
  const bool is_nan = (bits & 0x007fffffu) != 0;
  return (bits >> 16) | (is_nan ? 0x40u : 0u);
}

}  // namespace anabranch
