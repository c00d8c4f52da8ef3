// What optimizers of Python's do with many matrices.

#include <anabranch/optimizers.h>
#include <torch/library.h>

namespace anabranch::operators {
namespace {

at::Tensor orthogonalize(const at::Tensor& matrices, int64_t iterations) {
  return orthogonalized(matrices, iterations);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(anabranch, library) {
  library.def("orthogonalize(Tensor matrices, int iterations) -> Tensor");
}

TORCH_LIBRARY_IMPL(anabranch, CPU, library) { library.impl("orthogonalize", orthogonalize); }
TORCH_LIBRARY_IMPL(anabranch, CUDA, library) { library.impl("orthogonalize", orthogonalize); }

}  // namespace anabranch::operators
