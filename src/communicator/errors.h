#pragma once

#include <anabranch/communicator.h>
#include <anabranch/error.h>

#include <string>

namespace anabranch {

/// "all_to_all_v"
const char* name_of(Collective call);
/// Throws InputError unless the options of `call`, which makes a communicator, can be.
void check_options(const char* call, const CommunicatorOptions& options);
/// What `rank` throws that has waited for `peer` until the deadline, or lost it before.
CommunicationError waited_in_vain(int rank, Collective call, const CommunicatorOptions& options,
                                  int peer, const std::string& cause);

}  // namespace anabranch
