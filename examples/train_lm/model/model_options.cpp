#include "model/model_options.h"

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "add_unless.h"
#include "model/layer_options.h"
#include "require.h"

namespace train_lm {
namespace {

void check_yarn(const ModelOptions& model) {
  require(model.yarn_factor >= 1, "--yarn-factor must be at least 1, got ", model.yarn_factor);
  at_least("--yarn-positions", model.yarn_positions, model.yarn_factor > 1 ? 1 : 0);
  positive("--yarn-beta-slow", model.yarn_beta_slow);
  require(model.yarn_beta_fast > model.yarn_beta_slow, "--yarn-beta-fast ", model.yarn_beta_fast,
          " is not more than --yarn-beta-slow ", model.yarn_beta_slow);
  not_negative("--yarn-scale", model.yarn_scale);
  not_negative("--yarn-mscale", model.yarn_mscale);
  not_negative("--yarn-mscale-all", model.yarn_mscale_all);
}

void check_attention(const ModelOptions& model) {
  at_least("--heads", model.heads, 1);
  at_least("--kv-heads", model.kv_heads, 0);
  at_least("--head-size", model.head_size, 0);
  require(model.head_size > 0 || model.hidden % model.heads == 0, "--hidden ", model.hidden,
          " is not divisible by --heads ", model.heads);
  require(model.rotated_width() % 2 == 0, model.kv_rank > 0 ? "--rope-size" : "--hidden / --heads",
          " must be even, got ", model.rotated_width());
  require(model.heads % model.key_heads() == 0, "--heads ", model.heads,
          " is not divisible by --kv-heads ", model.kv_heads);
  positive("--rope-theta", model.rope_theta);
  check_yarn(model);
  at_least("--kv-rank", model.kv_rank, 0);
  if (model.kv_rank > 0) {
    at_least("--query-rank", model.query_rank, 0);
    at_least("--value-size", model.value_size, 0);
    at_least("--rope-size", model.rope_size, 2);
    require(model.key_heads() == model.heads && model.qk_norm == "none" && !model.attention_bias,
            "--kv-rank goes without --kv-heads, --qk-norm and --attention-bias");
  } else {
    require(model.query_rank == 0 && model.rope_size == 0 && model.value_size == 0,
            "--query-rank, --rope-size and --value-size are of attention with --kv-rank");
  }
}

void check_experts(const ModelOptions& model) {
  at_least("--expert-hidden", model.expert_hidden, 1);
  at_least("--experts", model.experts, 1);
  at_least("--top-k", model.top_k, 1);
  require(model.top_k <= model.experts, "--top-k ", model.top_k, " is more than --experts ",
          model.experts);
  at_least("--shared-expert-hidden", model.shared_expert_hidden, 0);
  at_least("--dense-layers", model.dense_layers, 0);
  require(model.dense_layers < model.layers, "--dense-layers ", model.dense_layers,
          " leaves none of --layers ", model.layers, " to the experts");
  at_least("--dense-hidden", model.dense_hidden, model.dense_layers > 0 ? 1 : 0);
  positive("--routing-scale", model.routing_scale);
  not_negative("--bias-rate", model.bias_rate);
  require(model.bias_update == "sign" || (model.bias_rate > 0 && model.bias_rate <= 1),
          "--bias-update quantile takes a --bias-rate of 0 to 1, how much of the new biases is "
          "taken");
}

void add_yarn_options(CLI::App& app, ModelOptions& model) {
  app.add_option("--yarn-factor", model.yarn_factor,
                 "by how much positions are stretched (YaRN); 1: not");
  app.add_option("--yarn-positions", model.yarn_positions,
                 "with --yarn-factor, those that the model was trained on");
  app.add_option("--yarn-beta-fast", model.yarn_beta_fast,
                 "numbers of a head that turn more often over them stay");
  app.add_option("--yarn-beta-slow", model.yarn_beta_slow,
                 "numbers that turn less often are stretched in full");
  app.add_option("--yarn-bounds", model.yarn_bounds, "whether these two are rounded apart")
      ->check(CLI::IsMember({"whole", "exact"}));
  app.add_option("--yarn-scale", model.yarn_scale,
                 "of rotated queries and keys; 0: by the factor and --yarn-mscale");
  app.add_option("--yarn-mscale", model.yarn_mscale, "DeepSeek-V3's mscale; 0: none");
  app.add_option("--yarn-mscale-all", model.yarn_mscale_all,
                 "DeepSeek-V3's mscale_all_dim; 0: none");
}

void add_attention_options(CLI::App& app, ModelOptions& model) {
  app.add_option("--heads", model.heads, "attention heads");
  app.add_option("--kv-heads", model.kv_heads,
                 "heads of keys and values, shared by heads of queries; 0: as many");
  app.add_option("--head-size", model.head_size, "width of a head; 0: hidden / heads");
  app.add_option("--qk-norm", model.qk_norm, "RMSNorm of queries and keys")
      ->check(CLI::IsMember({"none", "head", "all"}));
  app.add_option("--rope-theta", model.rope_theta, "base of the rotary positions");
  add_yarn_options(app, model);
  app.add_flag("--attention-bias", model.attention_bias, "biases in attention's projections");
  app.add_option(
      "--kv-rank", model.kv_rank,
      "keys and values of all heads are made of so many numbers a token (MLA); 0: not so");
  app.add_option("--query-rank", model.query_rank,
                 "with --kv-rank, the same of queries; 0: not so");
  app.add_option(
      "--rope-size", model.rope_size,
      "with --kv-rank, a head's numbers that are rotated, beside --head-size that are not");
  app.add_option("--value-size", model.value_size,
                 "with --kv-rank, a value's numbers; 0: --head-size");
}

void add_expert_options(CLI::App& app, ModelOptions& model) {
  app.add_option("--experts", model.experts, "experts in every block");
  app.add_option("--top-k", model.top_k, "experts a token goes to");
  app.add_option("--expert-hidden", model.expert_hidden, "inner width of an expert");
  app.add_flag("--glu", model.glu, "gated experts (SwiGLU) instead of GELU");
  app.add_flag("--expert-biases", model.expert_biases, "biases in the experts' projections");
  app.add_option("--shared-expert-hidden", model.shared_expert_hidden,
                 "inner width of an expert that sees every token; 0: none");
  app.add_option("--dense-layers", model.dense_layers, "first layers, which have no experts");
  app.add_option("--dense-hidden", model.dense_hidden, "inner width of these layers' networks");
  app.add_option("--gate", model.gate, "how a router chooses; docs/routing.md")
      ->check(CLI::IsMember(gates()));
  app.add_option("--router-score", model.router_score, "what makes a logit a score")
      ->check(CLI::IsMember(router_scores()));
  app.add_option("--renormalize", model.renormalize,
                 "weights of a token sum to 1; auto: of several")
      ->check(CLI::IsMember({"auto", "yes", "no"}));
  app.add_option("--routing-scale", model.routing_scale, "the weights are multiplied by it");
  app.add_option("--expert-groups", model.expert_groups,
                 "groups of experts: a token goes to those of its best --top-groups only");
  app.add_option("--top-groups", model.top_groups, "groups that a token's experts are of");
  app.add_option("--group-score", model.group_score, "the score of a group, of its experts'")
      ->check(CLI::IsMember(group_scores()));
  app.add_option("--bias-rate", model.bias_rate,
                 "balance by a selection bias that changes by so much a step; 0: none");
  app.add_option("--bias-update", model.bias_update,
                 "quantile: to what would have balanced the step, of which --bias-rate is taken")
      ->check(CLI::IsMember(bias_updates()));
}

}  // namespace

torch::Dtype ModelOptions::parameter_type() const {
  return dtype == "float64" ? at::kDouble : dtype == "bfloat16" ? at::kBFloat16 : at::kFloat;
}

void add_model_options(CLI::App& app, ModelOptions& model) {
  app.add_option("--vocabulary", model.vocabulary, "tokens there are; 256: bytes");
  app.add_option("--hidden", model.hidden, "width of a token");
  app.add_option("--layers", model.layers, "transformer blocks");
  app.add_option("--norm", model.norm, "LayerNorm without biases, or RMSNorm")
      ->check(CLI::IsMember({"layer", "rms"}));
  app.add_option("--norm-epsilon", model.norm_epsilon, "in its root");
  app.add_flag("--tied-head", model.tied_head, "the head is the embedding");
  app.add_option("--dtype", model.dtype,
                 "type of the parameters; bfloat16: with fp32 masters and sums of gradients")
      ->check(CLI::IsMember({"float32", "float64", "bfloat16"}));
  add_attention_options(app, model);
  add_expert_options(app, model);
}

void check_model(const ModelOptions& model) {
  at_least("--vocabulary", model.vocabulary, 1);
  at_least("--hidden", model.hidden, 1);
  at_least("--layers", model.layers, 1);
  positive("--norm-epsilon", model.norm_epsilon);
  check_experts(model);
  check_attention(model);
}

void to_json(nlohmann::json& json, const ModelOptions& options) {
  json = {{"vocabulary", options.vocabulary},
          {"hidden", options.hidden},
          {"layers", options.layers},
          {"norm", options.norm},
          {"norm-epsilon", options.norm_epsilon},
          {"tied-head", options.tied_head},
          {"heads", options.heads},
          {"kv-heads", options.kv_heads},
          {"head-size", options.head_size},
          {"qk-norm", options.qk_norm},
          {"rope-theta", options.rope_theta},
          {"attention-bias", options.attention_bias},
          {"experts", options.experts},
          {"top-k", options.top_k},
          {"expert-hidden", options.expert_hidden},
          {"glu", options.glu},
          {"expert-biases", options.expert_biases},
          {"shared-expert-hidden", options.shared_expert_hidden},
          {"dense-layers", options.dense_layers},
          {"dense-hidden", options.dense_hidden},
          {"router-score", options.router_score},
          {"renormalize", options.renormalize},
          {"routing-scale", options.routing_scale},
          {"bias-rate", options.bias_rate},
          {"dtype", options.dtype}};
  const ModelOptions usual;
  add_unless(usual.yarn_factor, "yarn-factor", options.yarn_factor, json);
  add_unless(usual.yarn_positions, "yarn-positions", options.yarn_positions, json);
  add_unless(usual.yarn_beta_fast, "yarn-beta-fast", options.yarn_beta_fast, json);
  add_unless(usual.yarn_beta_slow, "yarn-beta-slow", options.yarn_beta_slow, json);
  add_unless(usual.yarn_bounds, "yarn-bounds", options.yarn_bounds, json);
  add_unless(usual.yarn_scale, "yarn-scale", options.yarn_scale, json);
  add_unless(usual.yarn_mscale, "yarn-mscale", options.yarn_mscale, json);
  add_unless(usual.yarn_mscale_all, "yarn-mscale-all", options.yarn_mscale_all, json);
  add_unless(usual.kv_rank, "kv-rank", options.kv_rank, json);
  add_unless(usual.query_rank, "query-rank", options.query_rank, json);
  add_unless(usual.rope_size, "rope-size", options.rope_size, json);
  add_unless(usual.value_size, "value-size", options.value_size, json);
  add_unless(usual.gate, "gate", options.gate, json);
  add_unless(usual.expert_groups, "expert-groups", options.expert_groups, json);
  add_unless(usual.top_groups, "top-groups", options.top_groups, json);
  add_unless(usual.group_score, "group-score", options.group_score, json);
  add_unless(usual.bias_update, "bias-update", options.bias_update, json);
}

}  // namespace train_lm
