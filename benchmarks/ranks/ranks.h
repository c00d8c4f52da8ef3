#pragma once

#include <anabranch/communicator.h>
#include <anabranch/hierarchical.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "harness.h"

// What the benchmarks over several ranks share.

namespace anabranch::benchmark {

/// "cpu", or "cuda": a GPU of this host's, the ranks in turn. Throws where there is none.
torch::Device rank_device(const std::string& name);

/// MPI's ranks, through NCCL where `device` is a GPU, with rows that take the way asked for; this process
/// alone where no launcher started it.
std::shared_ptr<Communicator> make_world(AllToAll way, torch::Device device);

/// Seconds that `call` and what it leaves on the device's current stream take from a common start (a
/// barrier): what this rank needed.
double seconds_from_barrier(Communicator& world, torch::Device device,
                            const std::function<void()>& call);

/// The largest of the ranks' values, for each entry.
std::vector<double> over_ranks_max(Communicator& world, const std::vector<double>& values);

/// Names of the ranks' hosts.
std::vector<std::string> nodes(Communicator& world);

/// One line of JSON, to `file` (appended) or to standard output where it is empty; rank 0 alone.
void write_record(const Json& record, const std::string& file);

}  // namespace anabranch::benchmark
