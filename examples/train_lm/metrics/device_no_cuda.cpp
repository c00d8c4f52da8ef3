#include <stdexcept>

#include "metrics/device.h"

namespace train_lm {

std::string name_of(torch::Device /*device*/) { return ""; }

int64_t peak_memory_of_gpu(torch::Device device) {
  throw std::logic_error("a build without CUDA has no " + device.str());
}

}  // namespace train_lm
