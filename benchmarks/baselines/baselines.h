#pragma once

#include <string>
#include <vector>

namespace anabranch {

/// Names of the engines that the library is compared with, in the order in which they were added to the
/// table of engines when this was loaded. They run on either device, and "auto" does not consider them.
std::vector<std::string> baseline_engine_names();

}  // namespace anabranch
