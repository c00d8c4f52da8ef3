// A profiler that NVTX loads (NVTX_INJECTION64_PATH): writes the ranges of all threads, as they begin and
// end, to the file named by ANABRANCH_NVTX_RECORD, a line each.
#include <nvtx3/nvToolsExt.h>

#include <cstdlib>
#include <fstream>
#include <mutex>

namespace {

void write(const char* what, const char* name) {
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  std::ofstream(std::getenv("ANABRANCH_NVTX_RECORD"), std::ios::app) << what << ' ' << name << '\n';
}

int push(const char* name) {
  write("push", name);
  return 0;
}

int pop() {
  write("pop", "");
  return 0;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int InitializeInjectionNvtx2(
    NvtxGetExportTableFunc_t table_of) {
  const auto* callbacks =
      static_cast<const NvtxExportTableCallbacks*>(table_of(NVTX_ETID_CALLBACKS));
  NvtxFunctionTable functions = nullptr;
  unsigned int size = 0;
  if (callbacks == nullptr ||
      callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE, &functions, &size) == 0) {
    return 0;
  }
  *functions[NVTX_CBID_CORE_RangePushA] = reinterpret_cast<NvtxFunctionPointer>(push);
  *functions[NVTX_CBID_CORE_RangePop] = reinterpret_cast<NvtxFunctionPointer>(pop);
  return 1;
}
