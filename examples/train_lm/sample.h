#pragma once

#include <anabranch/communicator.h>

#include <string>

#include "model/model.h"
#include "options.h"

namespace train_lm {

/// The prompt and what the model writes after it, on rank 0; empty elsewhere. Text where tokens are bytes,
/// otherwise their numbers. `context`: of the tokens before it each is predicted from the last so many,
/// computed anew for it; 0: from all, whose keys and values are kept. Collective: rank 0's tokens need the
/// other ranks' experts, so these take part with no tokens of their own.
std::string sample_text(LanguageModel& model, const Options& options, int64_t context,
                        anabranch::Communicator& world);

/// Throws std::invalid_argument for a prompt that is none.
void check_prompt(const Options& options);

}  // namespace train_lm
