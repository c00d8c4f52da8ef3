#pragma once

#include <anabranch/communicator.h>

#include "data.h"
#include "model.h"
#include "options.h"

namespace train_lm {

/// [] Σ over tokens of −ln p(target); zero for no tokens.
torch::Tensor summed_loss(const torch::Tensor& logits, const torch::Tensor& targets);

/// Mean of −log2 p over sequences of held-out text that are the same for any number of ranks.
/// Collective.
double validation_bits_per_byte(LanguageModel& model, const Text& text, const Options& options,
                                anabranch::Communicator& world);

}  // namespace train_lm
