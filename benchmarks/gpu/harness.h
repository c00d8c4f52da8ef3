#pragma once

#include <cstdint>
#include <fstream>
#include <functional>
#include <sstream>
#include <string>
#include <vector>

// What the GPU benchmarks share: timing by device events, and results as JSON with their provenance.

namespace anabranch::benchmark {

/// Milliseconds of one call on the GPU: the median of several batches, each timed by events around
/// calls that follow one another, after a warm-up.
double gpu_milliseconds(const std::function<void()>& call);

/// Milliseconds of one of so many calls that follow one another, by events around them all.
double batch_milliseconds(const std::function<void()>& call, int calls);
/// The same for several calls that take turns, so that the GPU's clock is the same for all.
std::vector<double> gpu_milliseconds(const std::vector<std::function<void()>>& calls,
                                     int rounds = 9);

/// Microseconds of host time of one call whose work the host does not wait for.
double host_microseconds(const std::function<void()>& call);

/// One flat JSON object, in the order of insertion.
class Record {
 public:
  Record& add(const std::string& key, const std::string& value);
  Record& add(const std::string& key, const char* value) { return add(key, std::string(value)); }
  Record& add(const std::string& key, double value);
  Record& add(const std::string& key, int64_t value);
  std::string json() const { return "{" + text_ + "}"; }

 private:
  void key(const std::string& name);
  std::string text_;
};

/// GPU, driver, library versions, date, and the commit that was given.
Record provenance(const std::string& commit);

struct Arguments {
  std::string json;    ///< file to write; empty: none
  std::string commit;  ///< of the measured sources
  std::string engine = "auto";
  bool quick = false;  ///< a few cases only
};

/// --json FILE --commit HASH --engine NAME --quick
Arguments parse_arguments(int argc, char** argv);

/// Writes {"provenance": ..., "results": [...]}. Throws std::runtime_error if it cannot.
void write_json(const Arguments& arguments, const std::vector<Record>& results);

/// Runs `run` with the parsed arguments. Returns the exit code: 1 after an error, which is printed.
int run_benchmark(int argc, char** argv, const std::function<void(const Arguments&)>& run);

}  // namespace anabranch::benchmark
