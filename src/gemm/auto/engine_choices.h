#pragma once

#include <torch/types.h>

#include <map>
#include <mutex>
#include <optional>
#include <string>

namespace anabranch {

/// Which engine was the fastest for each kind of product on one kind of device, kept in a file from run
/// to run: the same choice, so the same sums, in each.
///
/// What cannot be read or written is warned about once and forgotten with the process.
class EngineChoices {
 public:
  explicit EngineChoices(std::string file);

  /// Milliseconds of each engine.
  using Times = std::map<std::string, double>;

  struct Choice {
    std::string engine;
    Times milliseconds;
    bool complete = true;  ///< otherwise engines found no memory: not for the file
  };
  std::optional<Choice> find(const std::string& product) const;
  void keep(const std::string& product, const Choice& choice);

  /// A line for each choice, with the times that led to it.
  std::string explain() const;

 private:
  void read();
  void write() const;

  std::string file_;
  mutable std::mutex mutex_;
  std::map<std::string, Choice> choices_;
};

/// Where those of a device are kept: in $ANABRANCH_CACHE_DIR, by default the user's cache folder, in a
/// file that is named by GPU and library versions.
std::string engine_choices_file(torch::Device device);

}  // namespace anabranch
