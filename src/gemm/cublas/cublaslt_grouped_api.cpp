#include "gemm/cublas/cublaslt_grouped_api.h"

#include <dlfcn.h>

namespace anabranch::cublaslt_grouped {

LayoutCreate find_layout_create() {
  if (cublasLtGetVersion() < kLeastVersion) {
    return nullptr;
  }
  // By the library's own name: one that Python has loaded is not in the global scope.
  Dl_info here;
  if (::dladdr(reinterpret_cast<void*>(&cublasLtGetVersion), &here) == 0) {
    return nullptr;
  }
  void* const library = ::dlopen(here.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) {
    return nullptr;
  }
  void* const found = ::dlsym(library, "cublasLtGroupedMatrixLayoutCreate");
  ::dlclose(library);  // it stays loaded, for this library is linked to it
  return reinterpret_cast<LayoutCreate>(found);
}

}  // namespace anabranch::cublaslt_grouped
