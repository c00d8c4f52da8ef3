#include "support/beside.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include <utility>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace anabranch {
namespace {

void use_one_thread() {
  at::get_num_threads();  // the first call sets what is set here
#ifdef _OPENMP
  omp_set_num_threads(1);
#endif
}

}  // namespace

std::future<void> beside(std::function<void()> work) {
  return std::async(std::launch::async, [work = std::move(work)] {
    use_one_thread();
    const at::NoGradGuard no_grad;
    work();
  });
}

}  // namespace anabranch
