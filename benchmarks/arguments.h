#pragma once

#include <anabranch/hierarchical.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace anabranch::benchmark {

/// The options of all benchmarks. Each takes some of them, and refuses the others.
struct Arguments {
  std::string json;    ///< file for the results; empty: none
  std::string commit;  ///< of the measured sources
  bool quick = false;  ///< a few cases only
  int rounds = 7;      ///< timed, after those that warm up
  int threads = 0;     ///< of LibTorch; 0: its default
  std::string engine = "auto";
  std::vector<std::string> shapes;  ///< by their names; none: all

  // One layer on each of several ranks, and what travels between them.
  int64_t tokens = 512;
  int64_t hidden = 256;
  int64_t expert_hidden = 512;
  int64_t experts = 8;
  int64_t top_k = 2;
  double skew = 0;  ///< s of Zipf's law for the experts' popularity; 0: uniform
  uint64_t seed = 1;
  std::string device = "cpu";  ///< or "cuda": a GPU for each rank
  std::string dtype = "fp32";  ///< or "bf16"
  AllToAll all_to_all = AllToAll::kFlat;
  std::string overlap = "off";  ///< of the layer, see MoEOptions
  std::string balance = "off";  ///< the same
  int64_t receive_rows_limit = 0;
  std::vector<int64_t> bytes = {16, 256, 4096, 16384, 65536, 262144};  ///< from a rank to another
};

/// flat, hierarchical, auto.
std::string to_string(AllToAll way);

/// What a benchmark says of itself: `options` are names of Arguments, as on the command line ("top-k").
struct Program {
  std::string description;
  std::vector<std::string> options;
  Arguments defaults = {};
};

/// The main of a benchmark: runs `run` with what the command line says. Returns the exit code: CLI11's
/// where it refuses the command line, 1 after an exception, which is printed.
int run_benchmark(int argc, char** argv, const Program& program,
                  const std::function<void(const Arguments&)>& run);

}  // namespace anabranch::benchmark
