#include "model/inference.h"

#include <anabranch/checkpoint.h>
#include <anabranch/error.h>
#include <anabranch/parameters.h>

#include <cmath>
#include <iostream>
#include <numbers>

#include "agreement.h"
#include "evaluation.h"
#include "huggingface/folder.h"
#include "sample.h"

namespace train_lm {
namespace {

void load(LanguageModel& model, const Options& options, const anabranch::ParallelGroups& groups) {
  if (!options.load_hf.empty()) {
    load_hf(options.load_hf, model, options.model, groups);
    return;
  }
  try {
    anabranch::load_checkpoint(options.output / "checkpoint", *model, nullptr, groups);
  } catch (const anabranch::CheckpointError& error) {
    throw Refusal(error.what());
  }
}

std::string evaluation(LanguageModel& model, const TokenSource& data, const Options& options,
                       anabranch::Communicator& world) {
  const double loss = validation_loss(model, data, options, world);
  auto text = c10::str("loss ", loss, "  perplexity ", std::exp(loss));
  if (const auto bytes = data.bytes_per_token()) {
    text += c10::str("  ", loss / *bytes / std::numbers::ln2, " bits/byte");
  }
  return text + c10::str("  (", options.validation_sequences, " sequences of ",
                         options.training.sequence_length, " tokens that are held out)");
}

}  // namespace

void use_model(const Options& options, const std::shared_ptr<anabranch::Communicator>& world) {
  std::unique_ptr<TokenSource> data;
  together(*world, [&] {
    check_options(options, world->size());
    if (options.evaluate) {
      data =
          open_token_source(options.data, options.training.sequence_length, options.training.seed);
    }
  });
  const auto groups = anabranch::make_parallel_groups(world, options.expert_parallel);
  LanguageModel model(options, groups.expert_parallel);
  load(model, options, groups);
  std::string said;
  if (options.evaluate) {
    said = evaluation(model, *data, options, *world) + "\n";
  }
  if (options.generate) {
    said += sample_text(model, options, options.sample.context, *world) + "\n";
  }
  if (world->rank() == 0) {
    std::cout << said << std::flush;
  }
}

}  // namespace train_lm
