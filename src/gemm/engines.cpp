#include "gemm/engines.h"

#include <algorithm>
#include <iterator>
#include <mutex>

#include "gemm/ampere/ampere_engine.h"
#include "gemm/cpu/cpu_engine.h"
#include "gemm/cublas/cublas_engines.h"
#include "gemm/hopper/hopper_engine.h"

namespace anabranch {
namespace {

/// Eight streams gain nothing over four, and their workspaces take 128 MiB more.
EngineEntry cublas_loop(int streams) {
  const auto make = [streams](torch::Device device) {
    return make_cublas_loop_engine(device, streams);
  };
  return {c10::str("cublas_loop_", streams), runs_cublas, make, /*considered_by_auto=*/streams < 8};
}

struct Table {
  std::mutex mutex;
  std::vector<EngineEntry> entries = {
      {"cpu", [](torch::Device device) { return device.is_cpu(); },
       [](torch::Device) { return make_cpu_engine(); }, true},
      {"hopper", runs_hopper, [](torch::Device) { return make_hopper_engine(); }, true,
       /*reads_counts_on_gpu=*/true},
      {"ampere", runs_ampere, [](torch::Device) { return make_ampere_engine(); }, true,
       /*reads_counts_on_gpu=*/true, /*outdone_by=*/"hopper"},
      cublas_loop(1),
      cublas_loop(2),
      cublas_loop(4),
      cublas_loop(8),
      {"cublas_grouped", runs_cublas, make_cublas_grouped_engine, true},
      // Not before it has been measured beside the others.
      {"cublaslt_grouped", runs_cublaslt_grouped, make_cublaslt_grouped_engine, false},
  };
};

Table& table() {
  static Table all;
  return all;
}

}  // namespace

std::vector<EngineEntry> engines_on(torch::Device device) {
  Table& all = table();
  const std::lock_guard lock(all.mutex);
  std::vector<EngineEntry> able;
  std::copy_if(all.entries.begin(), all.entries.end(), std::back_inserter(able),
               [&](const EngineEntry& entry) { return entry.runs_on(device); });
  return able;
}

void register_engine(EngineEntry entry) {
  Table& all = table();
  const std::lock_guard lock(all.mutex);
  const auto known =
      std::find_if(all.entries.begin(), all.entries.end(),
                   [&](const EngineEntry& other) { return other.name == entry.name; });
  if (known == all.entries.end()) {
    all.entries.push_back(std::move(entry));
  } else {
    *known = std::move(entry);
  }
}

}  // namespace anabranch
