#pragma once

#include <functional>
#include <memory>

namespace anabranch {

/// Somebody who watches what a step does, a communicator's bytes, say. Begins; ends when what it returns does.
using Observer = std::function<std::shared_ptr<void>()>;

/// While it lives, what this thread records for autograd keeps `observer`, so that backward is watched too,
/// whenever and on whatever thread it runs.
class ObservedBackward {
 public:
  explicit ObservedBackward(Observer observer);
  ~ObservedBackward();
  ObservedBackward(const ObservedBackward&) = delete;
  ObservedBackward& operator=(const ObservedBackward&) = delete;

 private:
  std::shared_ptr<const Observer> former_;
};

/// The observer that this thread's backward is to have; null where there is none. Kept by what is recorded.
std::shared_ptr<const Observer> backward_observer();

/// To be held while a backward runs.
inline std::shared_ptr<void> begin(const std::shared_ptr<const Observer>& observer) {
  return observer == nullptr ? nullptr : (*observer)();
}

}  // namespace anabranch
