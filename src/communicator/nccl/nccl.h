#pragma once

#include <anabranch/communicator.h>

namespace anabranch {

/// Whether the rows of this communicator's `all_to_all_v` go between GPUs through memory that they map
/// from each other.
bool uses_peer_memory(const Communicator& communicator);

}  // namespace anabranch
