#pragma once

#include <anabranch/communicator.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "communicator/peer_memory/rows.h"
#include "support/cuda/handle.h"

namespace anabranch {

class Goodbyes;

/// All-to-all between the GPUs of one host through memory that they map from each other, by a kernel
/// of this library's: rows are gathered where they are read, and cross once.
class PeerExchange {
 public:
  /// Whether the ranks are as it takes: on one host, no more than 8, and none of them with
  /// NCCL_P2P_DISABLE. Collective.
  static bool suits(Communicator& bootstrap);
  /// Collective over `bootstrap`, on the current device. Null on all ranks where memory cannot be
  /// mapped, and then `obstacle` says why.
  static std::unique_ptr<PeerExchange> make(Communicator& bootstrap, std::string& obstacle);
  ~PeerExchange();
  PeerExchange(const PeerExchange&) = delete;
  PeerExchange& operator=(const PeerExchange&) = delete;

  /// On `stream`, in the order of the calls whatever their streams; those that are recorded into a graph in that
  /// of their stream.
  void all_to_all_v(const std::vector<Transfer>& transfers, cudaStream_t stream);
  /// Ends what is in flight, with undefined data. Calls nothing of CUDA's. No call may follow.
  void abort() noexcept;

 private:
  struct Mailbox;
  struct Retired;
  PeerExchange(const Communicator& bootstrap, std::shared_ptr<const Goodbyes> goodbyes);
  std::string map(Communicator& bootstrap);

  peer::Arguments arguments_ = {};
  std::shared_ptr<Mailbox> own_;
  std::vector<std::pair<int, std::byte*>> mapped_;  ///< others' mailboxes, by owner
  bool mapped_by_all_ = false;
  int* aborted_ = nullptr;  ///< in host memory that the GPU reads
  CudaEvent last_;          ///< the end of the last exchange
};

}  // namespace anabranch
