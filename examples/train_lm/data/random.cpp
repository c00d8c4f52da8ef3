#include "data/random.h"

#include <ATen/CPUGeneratorImpl.h>

namespace train_lm {

uint64_t mixed_bits(uint64_t bits) {
  bits += 0x9e3779b97f4a7c15ULL;
  bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9ULL;
  bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebULL;
  return bits ^ (bits >> 31);
}

uint64_t mixed_seed(uint64_t seed, Stream stream, uint64_t item) {
  return mixed_bits(mixed_bits(mixed_bits(seed) ^ static_cast<uint64_t>(stream)) ^ item);
}

at::Generator make_generator(uint64_t seed, Stream stream, uint64_t item) {
  return at::make_generator<at::CPUGeneratorImpl>(mixed_seed(seed, stream, item));
}

}  // namespace train_lm
