#pragma once

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace anabranch {

/// Wrong input: says what was given and what was expected. Thrown before any row is exchanged.
class InputError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

/// A collective did not complete: a peer died, stalled, or runs with other options.
class CommunicationError : public std::runtime_error {
 public:
  CommunicationError(const std::string& message, std::vector<int> peers)
      : std::runtime_error(message), peers_(std::move(peers)) {}

  /// Ranks, within the communicator of the failed call, that the failure is laid to. Empty where the
  /// cause lies outside it; the message then names the rank of the world.
  const std::vector<int>& peers() const noexcept { return peers_; }

 private:
  std::vector<int> peers_;
};

/// A checkpoint is missing, truncated, corrupt, foreign, or does not fit the model.
class CheckpointError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace anabranch
