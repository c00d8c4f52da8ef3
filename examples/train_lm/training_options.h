#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>

namespace CLI {
class App;
}

namespace train_lm {

/// What the curve depends on beside the model.
struct TrainingOptions {
  int64_t steps = 1600;
  int64_t batch_size = 16;  ///< sequences, over all ranks
  int64_t sequence_length = 128;
  uint64_t seed = 1;
  double learning_rate = 3e-3;
  int64_t warmup = 60;
  double weight_decay = 0.1;
  double clip = 1.0;  ///< 0: gradients are not clipped
  double balance_loss = 0.01;
  double z_loss = 0.001;
  double sequence_balance_loss = 0;
  double global_balance_loss = 0;
  double importance_loss = 0;  ///< of the gate noisy_top_k, as the next
  double load_loss = 0;
  bool router_fp64 = false;
  double jitter = 0;                        ///< of what routers see
  double cross_node_limit = 0;              ///< share of choices that may leave a node; 0: any
  std::string forced_routing = "none";      ///< see anabranch::ForcedRouting
  std::string optimizer = "adamw";          ///< or "muon"
  std::string optimizer_state = "float32";  ///< or "bfloat16", rounded stochastically
};

void add_training_options(CLI::App& app, TrainingOptions& training);
/// Throws std::invalid_argument naming the first option that no run can be made of.
void check_training(const TrainingOptions& training);
void to_json(nlohmann::json& json, const TrainingOptions& options);

}  // namespace train_lm
