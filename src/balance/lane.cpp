#include "balance/lane.h"

#include "support/beside.h"

namespace anabranch {

std::shared_future<void> Lane::run(std::function<void()> travel) {
  if (last_.valid()) last_.wait();
  return last_ = beside(std::move(travel)).share();
}

}  // namespace anabranch
