#pragma once

#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "arguments.h"

// What all benchmarks share: rounds in which ways take turns, uneven splits, results with provenance.

namespace anabranch::benchmark {

using Json = nlohmann::ordered_json;

double median(std::vector<double> values);

/// For each of `ways`, the median of `rounds` values of measure(way). The ways take turns, in an order
/// that differs from round to round and is the same on all ranks: a change of the machine's clock hits
/// all alike, and none runs always after the same other. `warm_up` rounds more come first and do not count.
std::vector<double> medians_in_turn(size_t ways, int rounds,
                                    const std::function<double(size_t way)>& measure,
                                    int warm_up = 1);

/// Popularity of `experts` experts, ∝ 1/rank^skew in an order drawn from `seed`; sums to 1.
std::vector<double> zipf_shares(int64_t experts, double skew, uint64_t seed);

/// Counts that sum to `rows`, ∝ zipf_shares(experts, skew, 1), rounded.
std::vector<int64_t> zipf_counts(int64_t rows, int64_t experts, double skew);

/// Writes {"provenance": {...}, "results": [...]} where a file was asked for: processor, threads,
/// versions, date, the commit that was given, and what `device` has. Throws std::runtime_error if it cannot.
void write_results(const Arguments& arguments, const Json& results, const Json& device = {});

}  // namespace anabranch::benchmark
