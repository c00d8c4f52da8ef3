#include "harness.h"

#include <ATen/Parallel.h>
#include <torch/version.h>

#include <algorithm>
#include <cmath>
#include <ctime>
#include <fstream>
#include <numeric>
#include <random>
#include <stdexcept>

namespace anabranch::benchmark {
namespace {

std::string processor() {
  std::ifstream cpuinfo("/proc/cpuinfo");
  for (std::string line; std::getline(cpuinfo, line);) {
    if (line.starts_with("model name")) {
      return line.substr(line.find(':') + 2);
    }
  }
  return "unknown";
}

std::string today() {
  const std::time_t now = std::time(nullptr);
  char text[sizeof "2000-01-01"];
  std::strftime(text, sizeof text, "%Y-%m-%d", std::gmtime(&now));
  return text;
}

}  // namespace

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

std::vector<double> medians_in_turn(size_t ways, int rounds,
                                    const std::function<double(size_t way)>& measure, int warm_up) {
  std::vector<std::vector<double>> values(ways);
  std::vector<size_t> order(ways);
  std::iota(order.begin(), order.end(), size_t{0});
  std::mt19937 generator(1);
  for (int round = -warm_up; round < rounds; ++round) {
    std::shuffle(order.begin(), order.end(), generator);
    for (const size_t way : order) {
      const double value = measure(way);
      if (round >= 0) {
        values[way].push_back(value);
      }
    }
  }
  std::vector<double> medians;
  for (const auto& of_way : values) {
    medians.push_back(median(of_way));
  }
  return medians;
}

std::vector<double> zipf_shares(int64_t experts, double skew, uint64_t seed) {
  std::vector<double> shares;
  for (int64_t rank = 1; rank <= experts; ++rank) {
    shares.push_back(std::pow(static_cast<double>(rank), -skew));
  }
  std::mt19937_64 generator(seed);
  std::shuffle(shares.begin(), shares.end(), generator);
  const double total = std::accumulate(shares.begin(), shares.end(), 0.0);
  for (double& share : shares) {
    share /= total;
  }
  return shares;
}

std::vector<int64_t> zipf_counts(int64_t rows, int64_t experts, double skew) {
  std::vector<int64_t> counts;
  int64_t given = 0;
  double wanted = 0;
  for (const double share : zipf_shares(experts, skew, 1)) {
    wanted += share * static_cast<double>(rows);
    counts.push_back(std::llround(wanted) - given);
    given += counts.back();
  }
  return counts;
}

void write_results(const Arguments& arguments, const Json& results, const Json& device) {
  if (arguments.json.empty()) {
    return;
  }
  Json provenance = {{"processor", processor()},   {"threads", at::get_num_threads()},
                     {"torch", TORCH_VERSION},     {"compiler", __VERSION__},
                     {"commit", arguments.commit}, {"date", today()}};
  provenance.update(device.is_null() ? Json::object() : device);
  std::ofstream file(arguments.json);
  file << "{\"provenance\": " << provenance << ",\n \"results\": [";  // a line a result
  for (size_t i = 0; i < results.size(); ++i) {
    file << (i == 0 ? "\n  " : ",\n  ") << results[i];
  }
  file << "\n]}\n";
  if (!file.flush()) {
    throw std::runtime_error("cannot write " + arguments.json);
  }
}

}  // namespace anabranch::benchmark
