#pragma once

#include <anabranch/grouped_gemm.h>

#include <functional>

namespace anabranch {

/// One line of the table of all engines.
struct EngineEntry {
  std::string name;
  /// Whether it can run there. In a build without CUDA those that need it can nowhere.
  bool (*runs_on)(torch::Device device);
  std::function<std::shared_ptr<GroupedGemmEngine>(torch::Device device)> make;
  bool considered_by_auto;
  /// Whether it multiplies without the host knowing the counts, see ExpertCounts.
  bool reads_counts_on_gpu = false;
  /// An engine beside which auto does not consider it; empty: none.
  std::string outdone_by = {};
};

/// Those that run on a device: the library's, of which auto prefers the earlier where two are as fast,
/// and then those that were registered.
std::vector<EngineEntry> engines_on(torch::Device device);

/// Adds an engine that is not the library's, such as those of `anabranch_baselines`; in the place of one
/// of its name, if there is one.
void register_engine(EngineEntry entry);

}  // namespace anabranch
