#include "agreement.h"

#include <anabranch/agreement.h>

namespace train_lm {

void together(anabranch::Communicator& world, const std::function<void()>& work) {
  try {
    anabranch::succeed_together(world, work);
  } catch (const anabranch::WorkError& error) {
    throw Refusal(error.failures().at(error.peers().front()));
  }
}

void on_rank_zero(anabranch::Communicator& world, const std::function<void()>& work) {
  together(world, [&] {
    if (world.rank() == 0) {
      work();
    }
  });
}

}  // namespace train_lm
