#pragma once

#include <torch/types.h>

#include <chrono>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <string>

#include "gemm/auto/product.h"

namespace anabranch {

/// Which engine was the fastest for each product on one kind of device, kept in a file from run to run:
/// the same choice, so the same sums, in each.
///
/// Processes that share the file, also on several hosts, take what the first of them has kept. What cannot
/// be read or written is warned about once and forgotten with the process.
class EngineChoices {
 public:
  /// Of this process alone.
  EngineChoices() = default;
  /// `patience`: for the file's lock, which is held for milliseconds: longer, and its holder is gone or its
  /// server.
  explicit EngineChoices(std::string file, std::chrono::seconds patience = std::chrono::seconds{2});

  /// Milliseconds of each engine.
  using Times = std::map<std::string, double>;

  struct Choice {
    std::string engine;
    Times milliseconds;
    bool complete = true;  ///< otherwise engines found no memory: not for the file
  };
  /// Whether the engine of that name is there, and can multiply the product: what a file says is not
  /// taken unseen.
  using Able = std::function<bool(const std::string& engine)>;

  std::optional<Choice> find(const Product& product, const Able& able) const;
  /// That of the product at the least `distance`; of several the smallest.
  std::optional<Choice> nearest(const Product& product, const Able& able) const;
  /// Times of each engine as multiples of the best's, at the product nearest to this one, and no further
  /// than `within` from it, at which it was measured.
  std::map<std::string, double> slowness(const Product& product, double within) const;
  /// What is to be taken for the product from now on: `choice`, unless another process has kept one
  /// in the meantime.
  Choice keep(const Product& product, const Choice& choice, const Able& able);

  /// A line for each choice, with the times that led to it.
  std::string explain() const;

  /// All choices, also those that are not for the file; for another process.
  std::string text() const;
  /// Adds those of such a text, or of an empty one. Throws std::runtime_error if it is neither.
  void add(const std::string& text);

 private:
  using Choices = std::map<Product, Choice>;

  Choices read() const;
  void write(const Choices& choices) const;

  std::string file_;
  std::chrono::seconds patience_{0};
  mutable std::mutex mutex_;
  Choices choices_;
};

/// Where those of a device are kept: in $ANABRANCH_CACHE_DIR, by default the user's cache folder, in a
/// file that is named by GPU and library versions.
std::string engine_choices_file(torch::Device device);

}  // namespace anabranch
