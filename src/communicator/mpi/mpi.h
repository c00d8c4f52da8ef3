#pragma once

#include <anabranch/communicator.h>

#include <cstdint>
#include <memory>

namespace anabranch {

/// MPI counts are int: longer messages go in pieces of so many bytes. A power of two, so that no
/// element is cut.
inline constexpr int64_t kMpiPieceBytes = int64_t{1} << 30;

/// `make_mpi_communicator` with another piece length, for tests of the pieces.
std::shared_ptr<Communicator> make_mpi_communicator(const CommunicatorOptions& options,
                                                    int64_t piece_bytes);

}  // namespace anabranch
