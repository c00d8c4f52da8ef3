#pragma once

#include <anabranch/rank_discovery.h>

#include <optional>
#include <string>

#include "machine.h"

namespace anabranch::bind {

/// Where a rank runs.
struct Binding {
  CpuSet cpus;
  int cores = 0;           ///< of `cpus`; 0: left as they are, as there are more ranks than cores
  std::optional<int> gpu;  ///< its number among the machine's, in PCI order
  std::string visible_device;  ///< for CUDA_VISIBLE_DEVICES; empty: no GPU
  std::string nic;             ///< "mlx5_0"; empty: there is no choice to make
};

/// GPU `local_rank` modulo the number of GPUs, of those that CUDA_VISIBLE_DEVICES in `environment`
/// leaves; an equal share of the cores of that GPU's NUMA node (of all that this process may use where
/// there is no GPU); the nearest network adapter, in turn where several are equally near.
Binding choose_binding(const Machine& machine, int local_rank, int local_size,
                       const Environment& environment);

}  // namespace anabranch::bind
