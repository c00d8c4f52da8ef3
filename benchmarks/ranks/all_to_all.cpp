// Flat and hierarchical all-to-all of the same rows, in turn, over message sizes:
//   launch/mpirun.sh -n 8 --hosts a:4,b:4 build/release/benchmarks/benchmark_all_to_all
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include <cmath>
#include <cstdio>
#include <random>
#include <set>

#include "ranks/ranks.h"

namespace anabranch::benchmark {
namespace {

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

Json measure(Communicator& flat, Communicator& hierarchical, torch::Device device, int64_t bytes,
             const Arguments& arguments) {
  const Transfer transfer = random_rows(flat, device, bytes, arguments.seed);
  Transfer other = transfer;
  other.receive = at::empty_like(transfer.receive);
  const auto measure_way = [&](size_t way) {
    const auto call = [&] {
      way == 0 ? flat.all_to_all_v({transfer}) : hierarchical.all_to_all_v({other});
    };
    return over_ranks_max(flat, {seconds_from_barrier(flat, device, call)})[0];
  };
  const auto seconds = medians_in_turn(2, arguments.rounds, measure_way, /*warm_up=*/2);
  if (!transfer.receive.equal(other.receive)) {
    throw std::runtime_error("flat and hierarchical have brought different rows");
  }
  return {{"bytes_per_pair", bytes},
          {"flat_ms", seconds[0] * 1e3},
          {"hierarchical_ms", seconds[1] * 1e3}};
}

void run(const Arguments& arguments) {
  const torch::Device device = rank_device(arguments.device);
  const c10::DeviceGuard guard(device);
  const auto flat = make_world(AllToAll::kFlat, device);
  HierarchicalOptions two_hops;
  two_hops.all_to_all = AllToAll::kHierarchical;
  const auto hierarchical = make_hierarchical_communicator(flat, two_hops);
  const auto hosts = nodes(*flat);
  const auto host_count = std::set<std::string>(hosts.begin(), hosts.end()).size();
  Json results = Json::array();
  for (const int64_t bytes : arguments.bytes) {
    results.push_back(measure(*flat, *hierarchical, device, bytes, arguments));
    if (flat->rank() == 0) {
      const auto& last = results.back();
      const double flat_ms = last["flat_ms"];
      const double hierarchical_ms = last["hierarchical_ms"];
      std::printf("%9ld bytes a pair: flat %9.3f ms, hierarchical %9.3f ms, %5.2f× the speed\n",
                  static_cast<long>(bytes), flat_ms, hierarchical_ms, flat_ms / hierarchical_ms);
      std::fflush(stdout);
    }
  }
  if (flat->rank() == 0 && !arguments.json.empty()) {
    write_record({{"ranks", flat->size()}, {"nodes", host_count}, {"results", results}},
                 arguments.json);
  }
}

}  // namespace
}  // namespace anabranch::benchmark

int main(int argc, char** argv) {
  using namespace anabranch::benchmark;
  Arguments defaults;
  defaults.rounds = 15;
  return run_benchmark(argc, argv,
                       {"Flat and hierarchical all-to-all over message sizes",
                        {"bytes", "rounds", "seed", "device", "json"},
                        defaults},
                       run);
}
