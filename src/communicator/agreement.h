#pragma once

#include <anabranch/agreement.h>
#include <anabranch/communicator.h>

#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace anabranch {

/// Every rank's text, in rank order; lengths may differ. Collective.
std::vector<std::string> all_gather_strings(Communicator& communicator, const std::string& text);

/// Compares named values over the ranks. Where any differ from rank 0's, every rank throws a
/// CommunicationError that names the ranks, the fields and both values. Collective.
void check_agreement(Communicator& communicator,
                     const std::vector<std::pair<std::string, std::string>>& fields);

/// Runs `work` on every rank, and returns what each rank's threw, empty where it threw nothing.
/// Collective.
std::vector<std::string> run_together(Communicator& communicator,
                                      const std::function<void()>& work);

/// The first of what `run_together` has returned, with its rank: "rank 2: ..."; empty if there is none.
std::string first_failure(const std::vector<std::string>& failures);

}  // namespace anabranch
