#include "metrics/metrics.h"

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

std::vector<double> imbalance_per_layer(const StepRecord& record) {
  std::vector<double> result;
  for (const auto& load : record.expert_load.unbind()) {
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

/// "1.2 GiB".
std::string gibibytes(int64_t bytes) {
  std::ostringstream text;
  text << std::fixed << std::setprecision(1) << static_cast<double>(bytes) / (1 << 30) << " GiB";
  return text.str();
}

}  // namespace

MetricsLog::MetricsLog(const std::filesystem::path& file, int64_t last_step, const StepCost& cost)
    : events_(file.parent_path(), last_step + 1), cost_(cost) {
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

std::string MetricsLog::add(const StepRecord& record) {
  interval_.steps += 1;
  interval_.tokens += record.tokens;
  interval_.seconds += record.seconds;
  interval_.data_seconds += record.data_seconds;
  if (const auto exposed = record.exposed_communication_seconds) {
    interval_.exposed_seconds = interval_.exposed_seconds.value_or(0) + *exposed;
  }
  if (record.moves) {
    moves_ = record.moves;
  }
  const bool spike = spikes_.add(record.loss);
  if (spike) {
    interval_.spikes.push_back(record.step);
  }
  if (record.skipped) {
    interval_.skipped += 1;
    return c10::str("step ", record.step, ": loss ", record.loss,
                    ", and a gradient that is not finite: the parameters stay as they are");
  }
  return spike ? c10::str("step ", record.step, ": the loss leaps to ", record.loss) : "";
}

double MetricsLog::model_flops(const StepRecord& record) const {
  return cost_.flops_per_token * static_cast<double>(interval_.tokens) / interval_.seconds /
         record.ranks;
}

nlohmann::json MetricsLog::describe(const StepRecord& record) const {
  const auto per_layer = imbalance_per_layer(record);
  const auto steps = static_cast<double>(interval_.steps);
  nlohmann::json json = {
      {"step", record.step},
      {"loss", record.loss},
      {"tokens_per_second", static_cast<double>(interval_.tokens) / interval_.seconds},
      {"model_tflops", model_flops(record) / 1e12},
      {"step_seconds", interval_.seconds / steps},
      {"data_seconds", interval_.data_seconds / steps},
      {"memory", record.memory},
      {"rank_milliseconds", record.rank_milliseconds},
      {"imbalance", mean(per_layer)},
      {"imbalance_per_layer", per_layer},
      {"ranks", record.ranks},
      {"learning_rate", record.learning_rate},
      {"gradient_norm", record.gradient_norm},
      {"balance_loss", record.balance_loss},
      {"z_loss", record.z_loss},
      {"skipped", interval_.skipped},
      {"spikes", interval_.spikes},
      {"seconds", record.run_seconds}};
  if (cost_.peak_flops) {
    json["mfu"] = model_flops(record) / *cost_.peak_flops;
  }
  for (const auto& [part, norm] : record.gradient_norms) {
    json["gradient_norms"][part] = norm;
  }
  for (const auto& load : record.expert_load.unbind()) {
    json["load"].push_back(fractions(load));
  }
  const auto add_if_known = [&](const char* name, const std::optional<double>& value) {
    if (value) {
      json[name] = *value;
    }
  };
  if (interval_.exposed_seconds) {
    json["exposed_communication_seconds"] = *interval_.exposed_seconds / steps;
  }
  if (moves_) {
    json["moved_experts"] = moves_->experts;
    json["moved_bytes"] = moves_->bytes;
    json["moving_seconds"] = moves_->seconds;
    json["fullest_rank_before"] = moves_->before;
    json["fullest_rank_after"] = moves_->after;
  }
  add_if_known("validation_loss", record.validation_loss);
  add_if_known("validation_bpb", record.validation_bpb);
  return json;
}

std::string MetricsLog::write(const StepRecord& record, int64_t steps) {
  const nlohmann::json json = describe(record);
  stream_ << json.dump() << std::endl;
  nlohmann::json numbers = json;
  numbers.erase("spikes");  // are steps
  events_.write(numbers);

  std::ostringstream line;
  line << std::fixed << "step " << record.step << '/' << steps << std::setprecision(3) << "  loss "
       << record.loss;
  if (record.validation_bpb) {
    line << "  validation " << *record.validation_bpb << " bits/byte";
  } else if (record.validation_loss) {
    line << "  validation " << *record.validation_loss;
  }
  line << std::setprecision(0) << "  " << json["tokens_per_second"].get<double>() << " tokens/s";
  if (cost_.peak_flops) {
    line << "  " << json["model_tflops"].get<double>() << " TFLOP/s (MFU " << std::setprecision(1)
         << 100 * json["mfu"].get<double>() << " %)  " << gibibytes(record.memory);
  }
  line << std::setprecision(2) << "  imbalance " << json["imbalance"].get<double>();
  interval_ = {};
  return line.str();
}

}  // namespace train_lm
