#pragma once

#include <torch/types.h>

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <vector>

namespace anabranch {

/// How many rows each expert has, where rows lie expert-major: those of expert e behind those of experts
/// 0..e−1. The host knows it, or a GPU does; each asks the other where it must, once. Copies share what
/// they have learnt. Not for several threads at a time.
class ExpertCounts {
 public:
  /// As a GPU reads them, int64.
  struct OnDevice {
    torch::Tensor first_row;  ///< [experts + 1], the last being all that are some expert's
    torch::Tensor
        longest_first;  ///< [experts] experts by falling number of rows, ties in their order
  };

  ExpertCounts() : ExpertCounts(std::vector<int64_t>()) {}
  /// Known to the host. What is negative is refused where it is used.
  ExpertCounts(std::vector<int64_t> counts);  // NOLINT(google-explicit-constructor)
  ExpertCounts(std::initializer_list<int64_t> counts)
      : ExpertCounts(std::vector<int64_t>(counts)) {}
  /// Known to a device alone, but for `rows`: their sum, or more, and then the rows behind it are nobody's.
  ExpertCounts(OnDevice counts, int64_t rows);

  int64_t experts() const;
  int64_t rows() const;  ///< of all experts, and those behind them that are nobody's
  bool known_to_host() const;

  /// Where only a GPU knows them, the host waits for its current stream.
  const std::vector<int64_t>& on_host() const;
  /// In the memory of `device`, a GPU's.
  const OnDevice& on(torch::Device device) const;

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace anabranch
