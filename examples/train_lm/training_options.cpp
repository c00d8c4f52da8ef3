#include "training_options.h"

#include <CLI/CLI.hpp>
#include <cmath>
#include <nlohmann/json.hpp>

#include "add_unless.h"
#include "model/layer_options.h"
#include "require.h"

namespace train_lm {

void add_training_options(CLI::App& app, TrainingOptions& training) {
  app.add_option("--steps", training.steps, "optimizer steps, over all resumed runs");
  app.add_option("--batch-size", training.batch_size, "sequences a step, over all ranks");
  app.add_option("--sequence-length", training.sequence_length, "bytes of a sequence");
  app.add_option("--seed", training.seed, "of parameters, batches and sample");
  app.add_option("--learning-rate", training.learning_rate, "at its peak");
  app.add_option("--warmup", training.warmup, "steps until the peak; a cosine follows");
  app.add_option("--weight-decay", training.weight_decay, "AdamW's, on matrices only");
  app.add_option("--clip", training.clip, "largest gradient norm; 0: no clipping");
  app.add_option(
      "--balance-loss", training.balance_loss,
      "its coefficient, per layer; below 0 gates collapse, to try what skewed load does");
  app.add_option("--z-loss", training.z_loss, "its coefficient, per layer");
  app.add_option("--sequence-balance-loss", training.sequence_balance_loss,
                 "of the balance within each sequence (DeepSeek-V3), its coefficient");
  app.add_option(
      "--global-balance-loss", training.global_balance_loss,
      "of the balance of a whole step, over micro-batches and replicas, its coefficient");
  app.add_option("--importance-loss", training.importance_loss,
                 "of noisy_top_k: of the experts' sums of weights, its coefficient");
  app.add_option("--load-loss", training.load_loss,
                 "of noisy_top_k: of the experts' expected load, its coefficient");
  app.add_flag("--router-fp64", training.router_fp64, "logits, scores and weights in fp64");
  app.add_option("--jitter", training.jitter,
                 "routers see a token times noise of 1 ± so much (Switch Transformer)");
  app.add_option("--cross-node-limit", training.cross_node_limit,
                 "the share of a rank's choices of experts that may leave its node, the others "
                 "choose again within it (FasterMoE); another model. 0: any");
  app.add_option("--forced-routing", training.forced_routing,
                 "experts that no router has chosen, to measure speed")
      ->check(CLI::IsMember(forced_routings()));
  app.add_option("--optimizer", training.optimizer,
                 "muon: for hidden matrices, each expert's its own; AdamW for the rest")
      ->check(CLI::IsMember({"adamw", "muon"}));
  app.add_option("--optimizer-state", training.optimizer_state,
                 "type of AdamW's means and squares; bfloat16: rounded stochastically")
      ->check(CLI::IsMember({"float32", "bfloat16"}));
}

void check_training(const TrainingOptions& training) {
  at_least("--steps", training.steps, 1);
  at_least("--batch-size", training.batch_size, 1);
  at_least("--sequence-length", training.sequence_length, 1);
  at_least("--warmup", training.warmup, 0);
  positive("--learning-rate", training.learning_rate);
  not_negative("--weight-decay", training.weight_decay);
  not_negative("--clip", training.clip);
  require(std::isfinite(training.balance_loss), "--balance-loss must be finite, got ",
          training.balance_loss);
  not_negative("--z-loss", training.z_loss);
  not_negative("--sequence-balance-loss", training.sequence_balance_loss);
  not_negative("--global-balance-loss", training.global_balance_loss);
  not_negative("--importance-loss", training.importance_loss);
  not_negative("--load-loss", training.load_loss);
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
          {"z-loss", options.z_loss},
          {"optimizer", options.optimizer},
          {"optimizer-state", options.optimizer_state}};
  const TrainingOptions usual;
  add_unless(usual.sequence_balance_loss, "sequence-balance-loss", options.sequence_balance_loss,
             json);
  add_unless(usual.global_balance_loss, "global-balance-loss", options.global_balance_loss, json);
  add_unless(usual.importance_loss, "importance-loss", options.importance_loss, json);
  add_unless(usual.load_loss, "load-loss", options.load_loss, json);
  add_unless(usual.router_fp64, "router-fp64", options.router_fp64, json);
  add_unless(usual.jitter, "jitter", options.jitter, json);
  add_unless(usual.cross_node_limit, "cross-node-limit", options.cross_node_limit, json);
  add_unless(usual.forced_routing, "forced-routing", options.forced_routing, json);
}

}  // namespace train_lm
