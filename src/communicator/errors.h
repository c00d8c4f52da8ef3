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

/// Runs `body`, which uses `communicator`. If it throws when that has failed, the failure is thrown instead:
/// what CUDA or a check finds wrong in the numbers that an exchange ended early has left is no cause.
template <typename Body>
auto with_failure_first(Communicator& communicator, const Body& body) {
  try {
    return body();
  } catch (const std::exception&) {
    communicator.check();
    throw;
  }
}

}  // namespace anabranch
