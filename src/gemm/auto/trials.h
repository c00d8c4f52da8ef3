#pragma once

#include <anabranch/grouped_gemm.h>

#include <functional>
#include <memory>
#include <vector>

#include "gemm/auto/engine_choices.h"

namespace anabranch {

using Engines = std::vector<std::shared_ptr<GroupedGemmEngine>>;

/// One product of the engine that it is given, on the current stream of the operands' device.
using Run = std::function<void(GroupedGemmEngine&)>;

/// The first engine that none is clearly faster than, by measuring; engines come best guess first.
/// Those that come near the best are timed for longer, up to `most_milliseconds` in all, once each had a
/// turn. None is chosen where none finds the memory it needs.
EngineChoices::Choice fastest(Engines engines, const Run& run, torch::Device device,
                              double most_milliseconds);

}  // namespace anabranch
