#pragma once

#include <anabranch/communicator.h>
#include <mpi.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "communicator/mpi/progress.h"

namespace anabranch {

/// An MPI call failed.
class MpiError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Throws MpiError with the call, MPI's own words for `code` and the place, unless it succeeded.
void check_mpi(int code, const char* call, const char* file, int line);
#define ANABRANCH_CHECK_MPI(call) ::anabranch::check_mpi((call), #call, __FILE__, __LINE__)

/// Whether MPI reads and writes GPU memory, by its own word.
bool mpi_is_cuda_aware();

/// Why communication has ended, and through whom (ranks of MPI_COMM_WORLD).
struct MpiFailure {
  std::string text;
  std::vector<int> culprits;
};

/// MPI in this process: one duplicate of MPI_COMM_WORLD that carries every communicator's messages,
/// told apart by their tags, and the one failure after which none of them can be used.
///
/// Lives until the process ends. At exit it finalises MPI if it initialised it, but not after a
/// failure or when the process exits with another status than 0: finalising waits for the other
/// ranks, which may be waiting for this one. mpirun takes a rank that leaves so for a failed one
/// and ends the job. Until all are at their exit, it answers those that wait for it in a collective.
class MpiRuntime {
 public:
  /// The first call initialises MPI if nobody has. Collective over MPI_COMM_WORLD. Throws
  /// CommunicationError if the other ranks do not call it within `deadline`.
  static MpiRuntime& get(std::chrono::milliseconds deadline);

  MPI_Comm comm() const noexcept { return comm_; }
  int rank() const noexcept { return rank_; }
  int size() const noexcept { return size_; }
  /// How long it waits for other ranks when it starts and ends.
  std::chrono::milliseconds deadline() const noexcept { return deadline_; }
  /// Largest tag.
  int tag_limit() const noexcept { return tag_limit_; }
  /// Held around every MPI call: the library may have granted no more than
  /// MPI_THREAD_SERIALIZED, and autograd calls from threads of its own.
  std::mutex& mutex() noexcept { return mutex_; }

  /// Moves messages that nobody waits for; begins with its first use. Null where MPI does not let several
  /// threads call it, of which the program may have one.
  MpiProgress* progress();
  /// Whether it has any.
  bool has_background() const {
    const MpiProgress* progress = progress_;
    return progress != nullptr && progress->has_tasks();
  }

  /// The lowest id that no group of this rank has yet; 1 is all ranks.
  int next_group = 2;

  /// After the first failure no communicator of this process can be used any more.
  std::optional<MpiFailure> failure();
  void set_failure(const MpiFailure& failure);

  /// Keeps what MPI may still read or write after a failure.
  void abandon(std::vector<MPI_Request> requests, Messages messages);

 private:
  explicit MpiRuntime(std::chrono::milliseconds deadline);
  void duplicate_world(std::chrono::milliseconds deadline);

  struct Abandoned {
    std::vector<MPI_Request> requests;
    Messages messages;
  };

  std::chrono::milliseconds deadline_;
  MPI_Comm comm_ = MPI_COMM_NULL;
  int rank_ = 0;
  int size_ = 1;
  int tag_limit_ = 0;
  bool takes_threads_ = false;  ///< MPI_THREAD_MULTIPLE
  std::mutex mutex_;
  std::mutex failure_mutex_;
  std::optional<MpiFailure> failure_;
  std::vector<Abandoned> abandoned_;
  std::once_flag progress_begins_;
  std::atomic<MpiProgress*> progress_ = nullptr;
};

}  // namespace anabranch
