#pragma once

#include <memory>

#include "options.h"

namespace anabranch {
class Communicator;
}

namespace train_lm {

/// What --generate and --evaluate say of a model that has been trained. Throws Refusal where there is none.
/// Collective.
void use_model(const Options& options, const std::shared_ptr<anabranch::Communicator>& world);

}  // namespace train_lm
