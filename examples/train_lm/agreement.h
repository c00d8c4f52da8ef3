#pragma once

#include <anabranch/communicator.h>

#include <functional>
#include <stdexcept>

namespace train_lm {

/// What every rank has been told is wrong, with one message: it is enough that one rank prints it.
class Refusal : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Runs `work` here and waits for the others. If it threw on any rank, throws Refusal on all of
/// them with the message of the first such rank. Collective; `work` itself must not communicate.
void together(anabranch::Communicator& world, const std::function<void()>& work);

/// The same, for work that only rank 0 has.
void on_rank_zero(anabranch::Communicator& world, const std::function<void()>& work);

}  // namespace train_lm
