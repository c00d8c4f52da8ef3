#pragma once

#include <anabranch/communicator.h>

#include <functional>
#include <string>

namespace anabranch {

/// Runs `work`, which must not communicate, on every rank. If it throws on any, every rank throws a
/// CheckpointError with the message of the first rank that failed. Collective.
void do_together(Communicator& communicator, const std::function<void()>& work);

/// Rank 0's text on every rank. Collective.
std::string broadcast_string(Communicator& communicator, const std::string& text);

}  // namespace anabranch
