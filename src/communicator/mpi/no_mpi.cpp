#include <anabranch/communicator.h>
#include <anabranch/error.h>

#include "communicator/describe.h"

// Built in the place of mpi.cpp where there is no MPI.
namespace anabranch {

std::shared_ptr<Communicator> make_mpi_communicator(const CommunicatorOptions& /*options*/) {
  throw NotBuiltError("make_mpi_communicator: this build of anabranch has no MPI");
}

std::string describe_mpi() { return "MPI: not built"; }

}  // namespace anabranch
