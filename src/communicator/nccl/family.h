#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "communicator/nccl/datagram.h"

namespace anabranch {

/// A group's place among those that were split from one another: where one of this rank's fails, all of them
/// do, so that a rank which would wait in several of them one after another waits one deadline, not one for each.
/// Ranks are the group's own. Any thread may call.
class NcclFamily {
 public:
  /// Of a first group of `size` ranks.
  explicit NcclFamily(int size);
  /// Of a group of `members`, ranks of this one.
  NcclFamily split(const std::vector<int>& members) const;

  /// The first failure that is reported is the family's.
  void report(const NcclFailure& failure) const;
  /// The family's failure, of its culprits those that are in this group.
  std::optional<NcclFailure> failure() const;

 private:
  struct Shared {
    std::mutex mutex;
    std::optional<NcclFailure> failure;  ///< culprits by their ranks in the first group
  };
  NcclFamily(std::shared_ptr<Shared> shared, std::vector<int> ranks);

  std::shared_ptr<Shared> shared_;
  std::vector<int> ranks_;  ///< of the members in the first group
};

}  // namespace anabranch
