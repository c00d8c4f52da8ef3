// What optimizers of Python's do with many matrices.

#include <anabranch/optimizers.h>

#include "operators.h"

namespace anabranch::operators {
namespace {

at::Tensor orthogonalize(const at::Tensor& matrices, int64_t iterations) {
  return orthogonalized(matrices, iterations);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(anabranch, library) {
  Operators operators(library);
  operators.def("orthogonalize(Tensor matrices, int iterations) -> Tensor");
}

TORCH_LIBRARY_IMPL(anabranch, CPU, library) {
  Operators(library).impl("orthogonalize", orthogonalize);
}
TORCH_LIBRARY_IMPL(anabranch, CUDA, library) {
  Operators(library).impl("orthogonalize", orthogonalize);
}

}  // namespace anabranch::operators
