#pragma once

#include <anabranch/communicator.h>

#include <string>

#include "model.h"
#include "options.h"

namespace train_lm {

/// The prompt and what the model writes after it, on rank 0; empty elsewhere. Collective: rank 0's
/// tokens need the other ranks' experts, so these take part with no tokens of their own.
std::string sample_text(LanguageModel& model, const Options& options,
                        anabranch::Communicator& world);

}  // namespace train_lm
