#include "model/layer_options.h"

#include <anabranch/communicator.h>
#include <anabranch/moe_layer.h>

#include "data/random.h"

namespace train_lm {

const std::map<std::string, anabranch::Gate>& gates() {
  using anabranch::Gate;
  static const std::map<std::string, Gate> all{{"top_k", Gate::kTopK},
                                               {"noisy_top_k", Gate::kNoisyTopK},
                                               {"gshard", Gate::kGShard},
                                               {"sinkhorn", Gate::kSinkhorn},
                                               {"expert_choice", Gate::kExpertChoice}};
  return all;
}

const std::map<std::string, anabranch::RouterScore>& router_scores() {
  using anabranch::RouterScore;
  static const std::map<std::string, RouterScore> all{
      {"softmax", RouterScore::kSoftmax},
      {"sigmoid", RouterScore::kSigmoid},
      {"sqrt_softplus", RouterScore::kSqrtSoftplus}};
  return all;
}

const std::map<std::string, anabranch::BiasUpdate>& bias_updates() {
  using anabranch::BiasUpdate;
  static const std::map<std::string, BiasUpdate> all{{"sign", BiasUpdate::kSign},
                                                     {"quantile", BiasUpdate::kQuantile}};
  return all;
}

const std::map<std::string, anabranch::GroupScore>& group_scores() {
  using anabranch::GroupScore;
  static const std::map<std::string, GroupScore> all{
      {"top_two_sum", GroupScore::kTopTwoSum},
      {"maximum", GroupScore::kMaximum},
      {"top_share_sum", GroupScore::kTopShareSum},
      {"top_share_logit_sum", GroupScore::kTopShareLogitSum}};
  return all;
}

const std::map<std::string, anabranch::ForcedRouting>& forced_routings() {
  using anabranch::ForcedRouting;
  static const std::map<std::string, ForcedRouting> all{{"none", ForcedRouting::kNone},
                                                        {"balanced", ForcedRouting::kBalanced},
                                                        {"random", ForcedRouting::kRandom}};
  return all;
}

anabranch::MoEOptions layer_options(const Options& options, int64_t layer) {
  const ModelOptions& model = options.model;
  anabranch::MoEOptions moe;
  moe.hidden_size = model.hidden;
  moe.expert_hidden_size = model.expert_hidden;
  moe.num_experts = model.experts;
  moe.top_k = model.top_k;
  moe.gate = gates().at(model.gate);
  moe.router_score = router_scores().at(model.router_score);
  moe.renormalize = model.renormalize == "auto" ? model.top_k > 1 : model.renormalize == "yes";
  moe.routing_scale = model.routing_scale;
  moe.expert_bias = model.bias_rate > 0;
  moe.expert_bias_update = bias_updates().at(model.bias_update);
  moe.expert_groups = model.expert_groups;
  moe.top_groups = model.top_groups;
  moe.group_score = group_scores().at(model.group_score);
  moe.router_fp64 = options.training.router_fp64;
  moe.forced_routing = forced_routings().at(options.training.forced_routing);
  moe.jitter = options.training.jitter;
  moe.sequence_balance_coefficient = options.training.sequence_balance_loss;
  moe.global_balance_coefficient = options.training.global_balance_loss;
  moe.glu = model.glu;
  moe.activation = model.glu ? anabranch::Activation::kSilu : anabranch::Activation::kGeluTanh;
  moe.bias = model.expert_biases;
  moe.shared_expert_hidden_size = model.shared_expert_hidden;
  moe.cross_node_limit = options.training.cross_node_limit;
  moe.balance = options.balance;
  moe.receive_rows_limit = options.receive_rows_limit;
  moe.placement = options.move_experts > 0 ? "movable" : "blocks";
  moe.recompute = options.recompute == "experts";
  moe.dtype = model.parameter_type();
  moe.device = torch::Device(options.device);
  moe.seed = mixed_seed(options.training.seed, Stream::kExperts, static_cast<uint64_t>(layer));
  return moe;
}

void check_layer(const Options& options) {
  auto layer = layer_options(options, 0);
  layer.device = torch::kCPU;  // wherever it is to be
  anabranch::MoEFunction(layer, anabranch::make_self_communicator());
}

bool routers_draw(const Options& options) {
  return options.model.gate == "noisy_top_k" || options.model.gate == "gshard" ||
         options.training.jitter > 0 || options.training.forced_routing == "random";
}

}  // namespace train_lm
