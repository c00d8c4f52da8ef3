#pragma once

#include <anabranch/communicator.h>
#include <anabranch/error.h>

#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace anabranch {

/// What the ranks did together failed on some: what() has each one's message, peers() are these ranks.
class WorkError : public CommunicationError {
 public:
  explicit WorkError(std::vector<std::string> failures);

  /// What each rank's work threw, in rank order; empty where it threw nothing.
  const std::vector<std::string>& failures() const noexcept { return failures_; }

 private:
  std::vector<std::string> failures_;
};

/// Runs `work`, which must not communicate, on every rank, and waits for all of them. Where it threw on
/// any, every rank throws a WorkError: so a file that one rank cannot read, or memory that one has not,
/// ends in the same way everywhere, and no rank goes on to wait for another. Collective.
void succeed_together(Communicator& communicator, const std::function<void()>& work);

}  // namespace anabranch
