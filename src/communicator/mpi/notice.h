#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "communicator/mpi/group.h"
#include "communicator/mpi/runtime.h"

namespace anabranch {

/// A short message beside the data, which only ranks that have waited for long read or write.
struct MpiNotice {
  enum class Kind : int32_t {
    kQuestion,  ///< whom do you wait for?
    kAnswer,    ///< for `ranks`, in the call described by `group`, `call`, `sequence`
    kFailure,   ///< `ranks` are to blame, as `text` says
  };
  static constexpr size_t kMaxRanks = 64;

  Kind kind = Kind::kQuestion;
  int32_t question = 0;  ///< number of the question, repeated in the answer
  int32_t group = kNoMpiGroup;
  int32_t call = 0;
  int64_t sequence = 0;
  int32_t num_ranks = 0;
  std::array<int32_t, kMaxRanks> ranks = {};  ///< of MPI_COMM_WORLD
  std::array<char, 512> text = {};            ///< zero-terminated

  /// Keeps the first `kMaxRanks`.
  void set_ranks(const std::vector<int>& values);
  std::vector<int> get_ranks() const { return {ranks.begin(), ranks.begin() + num_ranks}; }
  /// Keeps what fits.
  void set_text(const std::string& value);
};

struct ReceivedMpiNotice {
  int source = 0;
  MpiNotice notice;
};

/// Starts to send; completion is nobody's concern.
void send_mpi_notice(MpiRuntime& runtime, int rank, const MpiNotice& notice);
/// The next notice that has come, if any.
std::optional<ReceivedMpiNotice> receive_mpi_notice(MpiRuntime& runtime);
/// Marks the runtime as failed and tells every other rank, without waiting for those that do not
/// listen.
void announce_failure(MpiRuntime& runtime, const MpiFailure& failure);

}  // namespace anabranch
