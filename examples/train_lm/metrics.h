#pragma once

#include <torch/types.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

namespace train_lm {

/// What is known of one step, over all ranks.
struct Metrics {
  int64_t step = 0;
  double loss = 0;  ///< mean over the global batch, in nats a token, without auxiliary losses
  std::optional<double> validation_loss;  ///< nats a token on held-out data
  std::optional<double> validation_bpb;   ///< bits a byte, where a token's bytes are known
  double tokens_per_second = 0;
  double seconds = 0;  ///< since the run began
  double learning_rate = 0;
  double gradient_norm = 0;   ///< before clipping
  double balance_loss = 0;    ///< mean over layers; 1 is perfect balance
  double z_loss = 0;          ///< mean over layers
  torch::Tensor expert_load;  ///< [layers, experts] int64 assignments
  int ranks = 1;
};

void to_json(nlohmann::json& json, const Metrics& metrics);

/// For people: "step 20/600  loss 2.345  ...".
std::string to_line(const Metrics& metrics, int64_t steps);

/// metrics.jsonl: one object a line, on disk as soon as it is written.
class MetricsFile {
 public:
  /// Keeps the lines of steps up to `last_step` that an earlier run wrote; 0: none.
  MetricsFile(const std::filesystem::path& file, int64_t last_step);
  void write(const Metrics& metrics);

 private:
  std::ofstream stream_;
};

}  // namespace train_lm
