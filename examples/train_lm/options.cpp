#include "options.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "huggingface/config.h"
#include "model/layer_options.h"
#include "require.h"
#include "sample.h"

namespace train_lm {
namespace {

constexpr int kUsageError = 2;
constexpr const char* kLoadHf = "--load-hf";

constexpr const char* kDescription =
    "Trains a byte-level Mixture-of-Experts language model: data parallel over all MPI ranks, its\n"
    "experts spread over them.  mpirun -n 2 train_lm --data FILE";

constexpr const char* kFooter =
    "\nDIR holds metrics.jsonl, TensorBoard's events, options.json, sample.txt and checkpoint/;\n"
    "launch/plot.py DIR draws them and writes report.html.\n"
    "SIGINT, SIGTERM and SIGUSR1 (taken for SIGTERM) end the run after the current step, with a\n"
    "checkpoint.\n"
    "Exit code: 0 done; 2 wrong options or data; 128 + signal interrupted, to be continued with\n"
    "--resume; 1 any other error.";

void add_run_options(CLI::App& app, Options& options) {
  app.add_option(
      "--data", options.data,
      "what to train on: a token file or a directory of them, any other file (its bytes), or "
      "synthetic:V, random tokens below V");
  app.add_option("--output", options.output, "DIR for all that the run writes");
  app.add_flag("--resume", options.resume, "continue the run in DIR from its checkpoint");
  app.add_flag("--generate", options.generate,
               "do not train: continue --prompt by the model in DIR or of --load-hf");
  app.add_flag("--evaluate", options.evaluate,
               "do not train: that model's loss on the held-out part of --data");
  app.add_option(kLoadHf, options.load_hf,
                 "start from this folder of transformers: its config.json and safetensors");
  app.add_option("--save-hf", options.save_hf,
                 "write the model into this folder in the end, as transformers loads it");
  app.add_option("--stop-at", options.stop_at, "save and leave after this step; 0: the last");
  app.add_option("--device", options.device, "where to compute; cuda: a GPU for each rank, by NCCL")
      ->check(CLI::IsMember({"cpu", "cuda"}));
  app.add_option("--expert-parallel", options.expert_parallel,
                 "ranks that share one set of experts and balance it; 0: all");
  app.add_option("--all-to-all", options.all_to_all,
                 "the way of tokens between nodes; auto: the faster, as measured")
      ->check(CLI::IsMember({"flat", "hierarchical", "auto"}));
  app.add_option("--move-experts", options.move_experts,
                 "steps after which experts move between ranks so that these have equal loads; 0: "
                 "none");
  app.add_option(
      "--balance", options.balance,
      "what travels where experts have more than their share: off, tokens; or experts' "
      "weights, where that is shorter by nominal (shadow) or measured rates (auto), until "
      "ranks have equal loads (replicas), or among all or groups of N ranks (gather, "
      "gather:N)");
  app.add_option("--receive-rows-limit", options.receive_rows_limit,
                 "tokens that a rank receives at a time, in rounds where they are more; 0: any "
                 "number");
  app.add_option("--micro-batch", options.micro_batch,
                 "sequences of a rank at a time, whose gradients are summed; 0: all of a step's");
  app.add_flag("--shard-optimizer", options.shard_optimizer,
               "masters and the optimizer's state of a parameter on one of the ranks that have it "
               "(ZeRO-1)");
  app.add_option(
         "--recompute", options.recompute,
         "less memory for more work in backward: of experts (also without a word) or blocks")
      ->expected(0, 1)
      ->transform(CLI::Transformer(std::map<std::string, std::string>{{"true", "experts"}}))
      ->check(CLI::IsMember({"none", "experts", "block"}));
  app.add_option("--attention", options.attention, "whose attention a GPU is to take, if it can")
      ->check(CLI::IsMember({"flash", "cudnn"}));
  app.add_flag("--stage-times", options.stage_times, "say at the end where a step's time went");
  app.add_option("--deadline", options.deadline, "seconds a rank waits for another");
  app.add_option("--log-interval", options.log_interval, "steps between lines of metrics");
  app.add_option("--validation-interval", options.validation_interval,
                 "steps between measurements on held-out text");
  app.add_option("--validation-sequences", options.validation_sequences,
                 "sequences of such a measurement");
  app.add_option("--checkpoint-interval", options.checkpoint_interval,
                 "steps between checkpoints; 0: only at the end");
  app.add_flag("--no-save", options.no_save, "write no checkpoint, at the end neither");
  app.add_flag("--async-save", options.async_save,
               "write checkpoints beside the next steps, from a copy in host memory");
  app.add_option("--prompt", options.sample.prompt,
                 "what the sample continues: text or, if tokens are not bytes, their numbers");
  app.add_option("--sample-length", options.sample.length, "tokens to write; 0: none");
  app.add_option("--temperature", options.sample.temperature,
                 "of the sample; 0: always the likeliest token");
  app.add_option("--top-p", options.sample.top_p,
                 "the sample is of the likeliest tokens that have so much probability together");
  app.add_option("--context", options.sample.context,
                 "tokens that --generate predicts each from, anew; 0: all, their keys and values "
                 "kept");
  app.add_option("--progress", options.progress, "a bar for terminals, lines for files")
      ->check(CLI::IsMember({"auto", "bar", "lines"}));
}

/// The model of the run that left options.json.
void apply_description(const std::filesystem::path& file, ModelOptions& model) {
  std::ifstream text(file);
  const auto description = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  require(
      description.is_object() && description.contains("model") && description["model"].is_object(),
      file.string(), " describes no model");
  std::vector<std::string> words;
  for (const auto& [name, value] : description["model"].items()) {
    words.push_back("--" + name + "=" +
                    (value.is_string() ? value.get<std::string>() : value.dump()));
  }
  CLI::App app;
  add_model_options(app, model);
  std::reverse(words.begin(), words.end());  // as CLI11 takes them
  app.parse(std::move(words));
}

/// Before all other options: the model whose options are the defaults of this run's.
void take_model(int argc, char** argv, ModelOptions& model) {
  CLI::App app;
  app.set_help_flag();
  app.allow_extras();
  std::string preset;
  Options options;
  app.add_option("--preset", preset)->check(CLI::IsMember(presets()));
  app.add_option(kLoadHf, options.load_hf);
  app.add_option("--output", options.output);
  app.add_flag("--generate", options.generate);
  app.add_flag("--evaluate", options.evaluate);
  app.parse(argc, argv);
  require(preset.empty() || options.load_hf.empty(), "--preset and --load-hf name two models");
  if (!preset.empty()) {
    apply_preset(preset, model);
  } else if (!options.load_hf.empty()) {
    apply_hf_config(options.load_hf, model);
  } else if (options.generate || options.evaluate) {
    apply_description(options.output / "options.json", model);
  }
}

}  // namespace

CommandLine parse_command_line(int argc, char** argv) {
  CommandLine result;
  CLI::App app(kDescription, "train_lm");
  app.footer(kFooter);
  app.option_defaults()->always_capture_default();
  std::string preset;
  app.add_option("--preset", preset, "a published model; its options below are then the defaults")
      ->check(CLI::IsMember(presets()));
  add_run_options(app, result.options);
  add_model_options(app, result.options.model);
  add_training_options(app, result.options.training);
  try {
    take_model(argc, argv, result.options.model);
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    std::ostringstream message;
    const int code = app.exit(error, message, message);
    result.train = false;
    result.message = message.str();
    result.exit_code = code == 0 ? 0 : kUsageError;
  } catch (const std::invalid_argument& error) {
    result = {result.options, false, c10::str("error: ", error.what(), "\n"), kUsageError};
  }
  return result;
}

void check_options(const Options& options, int64_t ranks) {
  check_model(options.model);
  check_training(options.training);
  require(options.model.gate == "noisy_top_k" ||
              (options.training.importance_loss == 0 && options.training.load_loss == 0),
          "--importance-loss and --load-loss are of --gate noisy_top_k");
  check_layer(options);
  at_least("--stop-at", options.stop_at, 0);
  at_least("--expert-parallel", options.expert_parallel, 0);
  require(options.expert_parallel == 0 || ranks % options.expert_parallel == 0,
          "--expert-parallel ", options.expert_parallel, " does not divide the number of ranks, ",
          ranks);
  at_least("--move-experts", options.move_experts, 0);
  at_least("--receive-rows-limit", options.receive_rows_limit, 0);
  at_least("--micro-batch", options.micro_batch, 0);
  at_least("--deadline", options.deadline, 1);
  at_least("--log-interval", options.log_interval, 1);
  at_least("--validation-interval", options.validation_interval, 1);
  at_least("--validation-sequences", options.validation_sequences, 1);
  at_least("--checkpoint-interval", options.checkpoint_interval, 0);
  at_least("--sample-length", options.sample.length, 0);
  not_negative("--temperature", options.sample.temperature);
  require(options.sample.top_p > 0 && options.sample.top_p <= 1,
          "--top-p must be above 0 and at most 1, got ", options.sample.top_p);
  at_least("--context", options.sample.context, 0);
  if (options.sample.length > 0) {
    check_prompt(options);
  }
  require(!options.data.empty() || (options.generate && !options.evaluate), "--data is required");
  require(options.load_hf.empty() || !options.resume,
          "--load-hf begins a run, --resume continues one");
  if (!options.save_hf.empty()) {
    hf_family_of(options.model);  // that there is one
  }
}

}  // namespace train_lm
