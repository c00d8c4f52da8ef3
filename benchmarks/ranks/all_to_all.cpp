// Flat and hierarchical all-to-all of the same rows, in turn, over message sizes:
//   launch/mpirun.sh -n 8 --hosts a:4,b:4 build/release/benchmarks/benchmark_all_to_all
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <iostream>
#include <random>
#include <set>

#include "ranks.h"

namespace anabranch::benchmark {
namespace {

struct Options {
  std::vector<int64_t> bytes = {16, 256, 4096, 16384, 65536, 262144};
  int rounds = 15;
  uint64_t seed = 1;
  std::string device = "cpu";
  std::string json;
};

/// Rows of 16 bytes; between half and one and a half of `bytes` from each rank to each other.
Transfer random_rows(const Communicator& world, torch::Device device, int64_t bytes,
                     uint64_t seed) {
  constexpr int64_t kRowBytes = 16;
  std::mt19937_64 engine(seed);
  std::uniform_real_distribution<double> share(0.5, 1.5);
  Transfer transfer;
  int64_t sent = 0, received = 0;
  for (int from = 0; from < world.size(); ++from) {
    for (int to = 0; to < world.size(); ++to) {
      const auto rows = std::max<int64_t>(
          1, std::llround(share(engine) * static_cast<double>(bytes) / kRowBytes));
      if (from == world.rank()) {
        transfer.send_rows.push_back(rows);
        sent += rows;
      }
      if (to == world.rank()) {
        transfer.receive_rows.push_back(rows);
        received += rows;
      }
    }
  }
  const auto options = at::TensorOptions(device).dtype(at::kByte);
  transfer.send = at::empty({sent, kRowBytes}, options).random_(0, 256);
  transfer.receive = at::empty({received, kRowBytes}, options);
  return transfer;
}

nlohmann::json measure(Communicator& flat, Communicator& hierarchical, torch::Device device,
                       int64_t bytes, const Options& options) {
  const Transfer transfer = random_rows(flat, device, bytes, options.seed);
  Transfer other = transfer;
  other.receive = at::empty_like(transfer.receive);
  std::vector<double> seconds[2];
  for (int round = -2; round < options.rounds; ++round) {
    const double flat_seconds =
        seconds_from_barrier(flat, device, [&] { flat.all_to_all_v({transfer}); });
    const double hierarchical_seconds =
        seconds_from_barrier(flat, device, [&] { hierarchical.all_to_all_v({other}); });
    const auto slowest = over_ranks_max(flat, {flat_seconds, hierarchical_seconds});
    if (round >= 0) {
      seconds[0].push_back(slowest[0]);
      seconds[1].push_back(slowest[1]);
    }
  }
  if (!transfer.receive.equal(other.receive)) {
    throw std::runtime_error("flat and hierarchical have brought different rows");
  }
  return {{"bytes_per_pair", bytes},
          {"flat_ms", median(seconds[0]) * 1e3},
          {"hierarchical_ms", median(seconds[1]) * 1e3}};
}

void run(const Options& options) {
  const torch::Device device = rank_device(options.device);
  const c10::DeviceGuard guard(device);
  const auto flat = make_world(AllToAll::kFlat, device);
  HierarchicalOptions two_hops;
  two_hops.all_to_all = AllToAll::kHierarchical;
  const auto hierarchical = make_hierarchical_communicator(flat, two_hops);
  const auto hosts = nodes(*flat);
  const auto host_count = std::set<std::string>(hosts.begin(), hosts.end()).size();
  nlohmann::json results = nlohmann::json::array();
  for (const int64_t bytes : options.bytes) {
    results.push_back(measure(*flat, *hierarchical, device, bytes, options));
    if (flat->rank() == 0) {
      const auto& last = results.back();
      const double flat_ms = last["flat_ms"];
      const double hierarchical_ms = last["hierarchical_ms"];
      std::printf("%9ld bytes a pair: flat %9.3f ms, hierarchical %9.3f ms, %5.2f× the speed\n",
                  static_cast<long>(bytes), flat_ms, hierarchical_ms, flat_ms / hierarchical_ms);
      std::fflush(stdout);
    }
  }
  if (flat->rank() == 0 && !options.json.empty()) {
    write_record({{"ranks", flat->size()}, {"nodes", host_count}, {"results", results}},
                 options.json);
  }
}

}  // namespace
}  // namespace anabranch::benchmark

int main(int argc, char** argv) {
  anabranch::benchmark::Options options;
  CLI::App app("Flat and hierarchical all-to-all over message sizes");
  app.option_defaults()->always_capture_default();
  app.add_option("--bytes", options.bytes, "mean bytes from a rank to another")->delimiter(',');
  app.add_option("--rounds", options.rounds, "timed rounds")->check(CLI::PositiveNumber);
  app.add_option("--seed", options.seed, "of the counts");
  app.add_option("--device", options.device, "cpu, or cuda: a GPU for each rank, by NCCL")
      ->check(CLI::IsMember({"cpu", "cuda"}));
  app.add_option("--json", options.json, "file to append one line of results to");
  CLI11_PARSE(app, argc, argv);
  try {
    anabranch::benchmark::run(options);
    return 0;
  } catch (const std::exception& error) {
    std::cerr << error.what() << std::endl;
    return 1;
  }
}
