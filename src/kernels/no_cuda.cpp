#include <stdexcept>

#include "kernels/kernels.h"

// Built in the place of cuda/ where there is no CUDA.
namespace anabranch {

const Kernels& cuda_kernels() {
  throw std::runtime_error(
      "tensors on a GPU need a build of anabranch with CUDA (ANABRANCH_CUDA=ON)");
}

}  // namespace anabranch
