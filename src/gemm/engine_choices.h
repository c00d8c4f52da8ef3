#pragma once

#include <torch/types.h>

#include <map>
#include <mutex>
#include <optional>
#include <string>

namespace anabranch {

/// Which engine was the fastest for each kind of product on one kind of GPU, kept in a file from run
/// to run: the same choice, so the same sums, in each.
///
/// The file lies in $ANABRANCH_CACHE_DIR, by default the user's cache folder, and is named by GPU
/// and library versions. What cannot be read or written is warned about once and forgotten with the
/// process.
class EngineChoices {
 public:
  explicit EngineChoices(torch::Device device);

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

}  // namespace anabranch
