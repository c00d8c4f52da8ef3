#pragma once

#include <anabranch/communicator.h>
#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include <chrono>
#include <memory>
#include <string>

namespace anabranch {

/// c10d's TCPStore on `host`:`port`, a server too where `serves` (port 0: any free one, then `port`
/// becomes it). Throws CommunicationError if it cannot be had within `deadline`.
c10::intrusive_ptr<c10d::Store> open_tcp_store(const std::string& host, int& port, bool serves,
                                               std::chrono::milliseconds deadline);

/// The ranks that know `store`, the one of rank 0's process.
std::shared_ptr<Communicator> make_store_communicator(c10::intrusive_ptr<c10d::Store> store,
                                                      int rank, int size,
                                                      const CommunicatorOptions& options);

}  // namespace anabranch
