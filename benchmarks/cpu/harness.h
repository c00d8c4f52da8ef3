#pragma once

#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

// What the CPU benchmarks share: paired timing, peak memory of tensors, results with provenance.

namespace anabranch::benchmark {

/// Milliseconds of each call: medians over `rounds` rounds that take the calls in turn, so that a
/// change of the machine's clock hits all alike. One round of warm-up.
std::vector<double> milliseconds(const std::vector<std::function<void()>>& calls, int rounds);

/// Most bytes that LibTorch's CPU allocator held during `call`, above what it held before.
int64_t peak_bytes(const std::function<void()>& call);

struct Arguments {
  std::string json;    ///< file to write; empty: none
  std::string commit;  ///< of the measured sources
  int rounds = 7;
  int threads = 0;  ///< 0: LibTorch's default
};

/// --json FILE --commit HASH --rounds N --threads N; exits through CLI11's own message on others.
Arguments parse_arguments(int argc, char** argv, const std::string& description);

/// Writes {"provenance": {...}, "results": [...]} if a file was asked for. Throws
/// std::runtime_error if it cannot.
void write_results(const Arguments& arguments, const nlohmann::json& results);

}  // namespace anabranch::benchmark
