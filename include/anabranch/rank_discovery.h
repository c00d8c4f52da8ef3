#pragma once

#include <map>
#include <optional>
#include <string>

namespace anabranch {

/// What the launcher of this process says about it.
struct RankInfo {
  int rank = 0;
  int size = 1;
  std::optional<int> local_rank;  ///< among the ranks of its node; unknown where nobody says it
  std::optional<int> local_size;
  std::string node;      ///< name of the host
  std::string launcher;  ///< "Open MPI", "Slurm", "torchrun", ...; empty: none
};

/// Variables of an environment, by name.
using Environment = std::map<std::string, std::string>;

/// Finds this process among its job's ranks by the variables that torchrun, Open MPI, PMI (MPICH,
/// Intel MPI, Cray), PMIx and Slurm leave; rank 0 of 1 where there are none. No communication.
///
/// Launchers may be nested (srun starts mpirun or torchrun on each node, which starts the ranks):
/// an outer one that has at most one process on this node is taken for the starter of the inner one,
/// which then counts. Otherwise all that speak have to agree: InputError names those that do not,
/// with their variables. So it does for values that are no rank or no size.
RankInfo discover_rank();
/// The same in `environment`, on the host `node`.
RankInfo discover_rank(const Environment& environment, std::string node);

/// The variables of this process.
Environment process_environment();

}  // namespace anabranch
