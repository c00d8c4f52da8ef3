#pragma once

#include <torch/types.h>

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>

namespace CLI {
class App;
}

namespace train_lm {

/// What the model is. A checkpoint can only be resumed by the same model.
struct ModelOptions {
  int64_t vocabulary = 256;  ///< bytes
  int64_t hidden = 128;
  int64_t layers = 4;
  std::string norm = "layer";  ///< or "rms"
  double norm_epsilon = 1e-5;
  bool tied_head = false;  ///< the head is the embedding

  int64_t heads = 4;
  int64_t kv_heads = 0;   ///< heads of keys and values, each for several of queries; 0: as many
  int64_t head_size = 0;  ///< 0: hidden / heads
  /// RMSNorm of queries and keys before their rotation: "none", of each "head", or across "all".
  std::string qk_norm = "none";
  double rope_theta = 1e4;
  /// By how much positions are stretched that the model was not trained on (YaRN, arXiv:2309.00071); 1: not.
  double yarn_factor = 1;
  int64_t yarn_positions = 0;  ///< that it was trained on
  /// Numbers of a head that turn more often over these positions stay; that turn less often than the second are
  /// stretched.
  double yarn_beta_fast = 32, yarn_beta_slow = 1;
  std::string yarn_bounds = "whole";  ///< which numbers these are: rounded apart, or "exact"
  double yarn_scale = 0;  ///< of rotated queries and keys; 0: by the factor, and the next two
  double yarn_mscale = 0, yarn_mscale_all = 0;  ///< DeepSeek-V3's; 0: none
  bool attention_bias = false;
  /// Keys and values of all heads are made of one vector of so many numbers a token (MLA); 0: not so.
  int64_t kv_rank = 0;
  int64_t query_rank = 0;  ///< with kv_rank, the same of queries; 0: of the token itself
  int64_t rope_size =
      0;  ///< with kv_rank, a head's numbers that are rotated, beside head_size that are not
  int64_t value_size = 0;  ///< with kv_rank, a value's numbers; 0: head_size

  int64_t experts = 8;
  int64_t top_k = 2;
  int64_t expert_hidden = 256;
  bool glu = false;
  bool expert_biases = false;
  int64_t shared_expert_hidden = 0;      ///< of an expert that sees every token; 0: none
  int64_t dense_layers = 0;              ///< the first layers, which have no experts
  int64_t dense_hidden = 0;              ///< inner width of their feed-forward network
  std::string gate = "top_k";            ///< how a router chooses, see anabranch::Gate
  std::string router_score = "softmax";  ///< see anabranch::RouterScore
  /// Of a token's weights to 1: "yes", "no", or "auto": of several, but not of a single expert's, whose
  /// weight trains the router.
  std::string renormalize = "auto";
  double routing_scale = 1;
  int64_t expert_groups = 1;  ///< a token goes to experts of the best `top_groups` of them only
  int64_t top_groups = 1;
  std::string group_score = "top_two_sum";  ///< see anabranch::GroupScore
  /// What a step adds to the selection bias of experts with too few tokens: balance without a loss; 0: none.
  double bias_rate = 0;
  std::string bias_update =
      "sign";  ///< see anabranch::BiasUpdate; with "quantile" the rate is a share

  std::string dtype = "float32";

  int64_t query_heads() const { return heads; }
  int64_t key_heads() const { return kv_heads > 0 ? kv_heads : heads; }
  int64_t head_width() const { return head_size > 0 ? head_size : hidden / heads; }
  int64_t rotated_width() const { return kv_rank > 0 ? rope_size : head_width(); }
  int64_t value_width() const { return value_size > 0 ? value_size : head_width(); }
  /// Over all heads, the mean of what is multiplied to weigh a value and what is summed of it.
  int64_t attention_width() const {
    return heads * (head_width() + (kv_rank > 0 ? rope_size : 0) + value_width()) / 2;
  }
  int64_t moe_layers() const { return layers - dense_layers; }
  torch::Dtype parameter_type() const;
};

/// Becomes the model of that name, one of presets(). Throws std::invalid_argument for another.
void apply_preset(const std::string& name, ModelOptions& model);
const std::vector<std::string>& presets();

void add_model_options(CLI::App& app, ModelOptions& model);
/// Throws std::invalid_argument naming the first option that no model can be made of.
void check_model(const ModelOptions& model);
void to_json(nlohmann::json& json, const ModelOptions& options);

}  // namespace train_lm
