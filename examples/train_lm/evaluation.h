#pragma once

#include <anabranch/communicator.h>

#include "data/data.h"
#include "model/model.h"
#include "options.h"

namespace train_lm {

/// Mean of −ln p over held-out sequences that are the same for any number of ranks. Collective.
double validation_loss(LanguageModel& model, const TokenSource& data, const Options& options,
                       anabranch::Communicator& world);

}  // namespace train_lm
