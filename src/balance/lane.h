#pragma once

#include <anabranch/communicator.h>

#include <functional>
#include <future>
#include <memory>
#include <utility>

namespace anabranch {

/// Carries weights beside what a layer computes: over a group of its ranks that nothing else uses, by a thread.
class Lane {
 public:
  /// Collective.
  explicit Lane(Communicator& of) : communicator_(of.split(0, of.rank())) {}

  Communicator& communicator() const { return *communicator_; }
  /// One travel after another, in the order in which the ranks run them.
  std::shared_future<void> run(std::function<void()> travel);

 private:
  std::shared_ptr<Communicator> communicator_;
  std::shared_future<void> last_;
};

}  // namespace anabranch
