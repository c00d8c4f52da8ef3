#include "options.h"

#include <CLI/CLI.hpp>
#include <cmath>
#include <nlohmann/json.hpp>
#include <sstream>

#include "require.h"

namespace train_lm {
namespace {

constexpr int kUsageError = 2;

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

void add_model_options(CLI::App& app, ModelOptions& model) {
  app.add_option("--hidden", model.hidden, "width of a token");
  app.add_option("--expert-hidden", model.expert_hidden, "inner width of an expert");
  app.add_option("--layers", model.layers, "transformer blocks");
  app.add_option("--heads", model.heads, "attention heads");
  app.add_option("--experts", model.experts, "experts in every block");
  app.add_option("--top-k", model.top_k, "experts a token goes to");
  app.add_flag("--glu", model.glu, "gated experts (SwiGLU) instead of GELU");
  app.add_option("--dtype", model.dtype, "type of the parameters")
      ->check(CLI::IsMember({"float32", "float64"}));
}

void add_training_options(CLI::App& app, TrainingOptions& training) {
  app.add_option("--steps", training.steps, "optimizer steps, over all resumed runs");
  app.add_option("--batch-size", training.batch_size, "sequences a step, over all ranks");
  app.add_option("--sequence-length", training.sequence_length, "bytes of a sequence");
  app.add_option("--seed", training.seed, "of parameters, batches and sample");
  app.add_option("--learning-rate", training.learning_rate, "at its peak");
  app.add_option("--warmup", training.warmup, "steps until the peak; a cosine follows");
  app.add_option("--weight-decay", training.weight_decay, "AdamW's, on matrices only");
  app.add_option("--clip", training.clip, "largest gradient norm; 0: no clipping");
  app.add_option("--balance-loss", training.balance_loss, "its coefficient, per layer");
  app.add_option("--z-loss", training.z_loss, "its coefficient, per layer");
}

void add_run_options(CLI::App& app, Options& options) {
  app.add_option(
         "--data", options.data,
         "what to train on: a token file or a directory of them, any other file (its bytes), or "
         "synthetic:V, random tokens below V")
      ->required();
  app.add_option("--output", options.output, "DIR for all that the run writes");
  app.add_flag("--resume", options.resume, "continue the run in DIR from its checkpoint");
  app.add_option("--stop-at", options.stop_at, "save and leave after this step; 0: the last");
  app.add_option("--device", options.device, "where to compute; cuda: a GPU for each rank, by NCCL")
      ->check(CLI::IsMember({"cpu", "cuda"}));
  app.add_option("--expert-parallel", options.expert_parallel,
                 "ranks that share one set of experts and balance it; 0: all");
  app.add_option("--all-to-all", options.all_to_all,
                 "the way of tokens between nodes; auto: the faster, as measured")
      ->check(CLI::IsMember({"flat", "hierarchical", "auto"}));
  app.add_flag("--recompute", options.recompute, "less memory for more work in backward");
  app.add_option("--deadline", options.deadline, "seconds a rank waits for another");
  app.add_option("--log-interval", options.log_interval, "steps between lines of metrics");
  app.add_option("--validation-interval", options.validation_interval,
                 "steps between measurements on held-out text");
  app.add_option("--validation-sequences", options.validation_sequences,
                 "sequences of such a measurement");
  app.add_option("--checkpoint-interval", options.checkpoint_interval,
                 "steps between checkpoints; 0: only at the end");
  app.add_option("--prompt", options.sample.prompt, "what the sample continues");
  app.add_option("--sample-length", options.sample.length, "bytes of text to write; 0: none");
  app.add_option("--temperature", options.sample.temperature, "of the sample");
  app.add_option("--progress", options.progress, "a bar for terminals, lines for files")
      ->check(CLI::IsMember({"auto", "bar", "lines"}));
}

void at_least(const char* name, int64_t value, int64_t minimum) {
  require(value >= minimum, name, " must be at least ", minimum, ", got ", value);
}

void not_negative(const char* name, double value) {
  require(std::isfinite(value) && value >= 0, name, " must be finite and not negative, got ",
          value);
}

void positive(const char* name, double value) {
  require(std::isfinite(value) && value > 0, name, " must be finite and positive, got ", value);
}

void check_model(const ModelOptions& model) {
  at_least("--hidden", model.hidden, 1);
  at_least("--expert-hidden", model.expert_hidden, 1);
  at_least("--layers", model.layers, 1);
  at_least("--heads", model.heads, 1);
  at_least("--experts", model.experts, 1);
  at_least("--top-k", model.top_k, 1);
  require(model.top_k <= model.experts, "--top-k ", model.top_k, " is more than --experts ",
          model.experts);
  require(model.hidden % model.heads == 0, "--hidden ", model.hidden,
          " is not divisible by --heads ", model.heads);
  require(model.hidden / model.heads % 2 == 0, "--hidden / --heads must be even, got ",
          model.hidden / model.heads);
}

void check_training(const TrainingOptions& training) {
  at_least("--steps", training.steps, 1);
  at_least("--batch-size", training.batch_size, 1);
  at_least("--sequence-length", training.sequence_length, 1);
  at_least("--warmup", training.warmup, 0);
  positive("--learning-rate", training.learning_rate);
  not_negative("--weight-decay", training.weight_decay);
  not_negative("--clip", training.clip);
  not_negative("--balance-loss", training.balance_loss);
  not_negative("--z-loss", training.z_loss);
}

}  // namespace

CommandLine parse_command_line(int argc, char** argv) {
  CommandLine result;
  CLI::App app(kDescription, "train_lm");
  app.footer(kFooter);
  app.option_defaults()->always_capture_default();
  add_run_options(app, result.options);
  add_model_options(app, result.options.model);
  add_training_options(app, result.options.training);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    std::ostringstream message;
    const int code = app.exit(error, message, message);
    result.train = false;
    result.message = message.str();
    result.exit_code = code == 0 ? 0 : kUsageError;
  }
  return result;
}

void check_options(const Options& options, int64_t ranks) {
  check_model(options.model);
  check_training(options.training);
  at_least("--stop-at", options.stop_at, 0);
  at_least("--expert-parallel", options.expert_parallel, 0);
  require(options.expert_parallel == 0 || ranks % options.expert_parallel == 0,
          "--expert-parallel ", options.expert_parallel, " does not divide the number of ranks, ",
          ranks);
  at_least("--deadline", options.deadline, 1);
  at_least("--log-interval", options.log_interval, 1);
  at_least("--validation-interval", options.validation_interval, 1);
  at_least("--validation-sequences", options.validation_sequences, 1);
  at_least("--checkpoint-interval", options.checkpoint_interval, 0);
  at_least("--sample-length", options.sample.length, 0);
  require(!options.sample.prompt.empty(), "--prompt must not be empty");
  positive("--temperature", options.sample.temperature);
}

void to_json(nlohmann::json& json, const ModelOptions& options) {
  json = {{"hidden", options.hidden},   {"expert-hidden", options.expert_hidden},
          {"layers", options.layers},   {"heads", options.heads},
          {"experts", options.experts}, {"top-k", options.top_k},
          {"glu", options.glu},         {"dtype", options.dtype}};
}

void to_json(nlohmann::json& json, const TrainingOptions& options) {
  json = {{"steps", options.steps},
          {"batch-size", options.batch_size},
          {"sequence-length", options.sequence_length},
          {"seed", options.seed},
          {"learning-rate", options.learning_rate},
          {"warmup", options.warmup},
          {"weight-decay", options.weight_decay},
          {"clip", options.clip},
          {"balance-loss", options.balance_loss},
          {"z-loss", options.z_loss}};
}

}  // namespace train_lm
