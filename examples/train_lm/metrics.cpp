#include "metrics.h"

#include <ATen/ATen.h>
#include <anabranch/moe_layer.h>

#include <iomanip>
#include <nlohmann/json.hpp>
#include <numeric>
#include <sstream>

#include "replace_file.h"

namespace train_lm {
namespace {

std::vector<double> fractions(const torch::Tensor& load) {
  const auto values = load.to(at::kDouble) / load.sum().item<double>();
  const auto* data = values.const_data_ptr<double>();
  return {data, data + values.numel()};
}

std::vector<double> imbalance_per_layer(const Metrics& metrics) {
  std::vector<double> result;
  for (const auto& load : metrics.expert_load.unbind()) {
    result.push_back(anabranch::imbalance(load));
  }
  return result;
}

double mean(const std::vector<double>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

/// A line cut short by a crash is no line.
bool is_kept(const std::string& line, int64_t last_step) {
  const auto json = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
  return json.is_object() && json.value("step", last_step + 1) <= last_step;
}

}  // namespace

void to_json(nlohmann::json& json, const Metrics& metrics) {
  const auto per_layer = imbalance_per_layer(metrics);
  json = {{"step", metrics.step},
          {"loss", metrics.loss},
          {"tokens_per_second", metrics.tokens_per_second},
          {"imbalance", mean(per_layer)},
          {"imbalance_per_layer", per_layer},
          {"ranks", metrics.ranks},
          {"learning_rate", metrics.learning_rate},
          {"gradient_norm", metrics.gradient_norm},
          {"balance_loss", metrics.balance_loss},
          {"z_loss", metrics.z_loss},
          {"seconds", metrics.seconds}};
  for (const auto& load : metrics.expert_load.unbind()) {
    json["load"].push_back(fractions(load));
  }
  if (metrics.validation_loss) {
    json["validation_loss"] = *metrics.validation_loss;
  }
  if (metrics.validation_bpb) {
    json["validation_bpb"] = *metrics.validation_bpb;
  }
}

std::string to_line(const Metrics& metrics, int64_t steps) {
  std::ostringstream line;
  line << std::fixed << "step " << metrics.step << '/' << steps << std::setprecision(3) << "  loss "
       << metrics.loss;
  if (metrics.validation_bpb) {
    line << "  validation " << *metrics.validation_bpb << " bits/byte";
  } else if (metrics.validation_loss) {
    line << "  validation " << *metrics.validation_loss;
  }
  line << std::setprecision(0) << "  " << metrics.tokens_per_second << " tokens/s  imbalance "
       << std::setprecision(2) << mean(imbalance_per_layer(metrics));
  return line.str();
}

MetricsFile::MetricsFile(const std::filesystem::path& file, int64_t last_step) {
  std::ostringstream kept;
  std::ifstream earlier(file);
  for (std::string line; std::getline(earlier, line);) {
    if (is_kept(line, last_step)) {
      kept << line << '\n';
    }
  }
  earlier.close();
  replace_file(file, kept.str());
  stream_.exceptions(std::ios::failbit | std::ios::badbit);
  stream_.open(file, std::ios::app);
}

void MetricsFile::write(const Metrics& metrics) {
  stream_ << nlohmann::json(metrics).dump() << std::endl;
}

}  // namespace train_lm
