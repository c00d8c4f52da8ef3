#include "communicator/errors.h"

#include <array>

#include "communicator/waiting_time.h"
#include "support/check.h"

namespace anabranch {

const char* name_of(Collective call) {
  constexpr std::array names = {"all_to_all_v", "all_reduce", "all_gather",
                                "broadcast",    "barrier",    "split"};
  return names.at(static_cast<size_t>(call));
}

void check_options(const char* call, const CommunicatorOptions& options) {
  check_input(options.deadline.count() > 0, call, ": the deadline is ", options.deadline.count(),
              " ms, expected more than 0");
}

CommunicationError waited_in_vain(int rank, Collective call, const CommunicatorOptions& options,
                                  int peer, const std::string& cause) {
  return {
      c10::str("rank ", rank, ": ", name_of(call), " waited up to ", in_seconds(options.deadline),
               " for rank ", peer, " (dead, stalled, or not making the call): ", cause),
      {peer}};
}

}  // namespace anabranch
