#pragma once

#include <hwloc.h>

#include <memory>
#include <string>
#include <vector>

namespace anabranch::bind {

struct BitmapDeleter {
  void operator()(hwloc_bitmap_t bitmap) const { hwloc_bitmap_free(bitmap); }
};
using CpuSet = std::unique_ptr<hwloc_bitmap_s, BitmapDeleter>;

/// A copy. Throws std::bad_alloc.
CpuSet copy(hwloc_const_cpuset_t set);
/// "0-3,8", as taskset takes it.
std::string to_list(hwloc_const_cpuset_t set);

/// The machine as hwloc sees it: cores, NUMA nodes, and the PCI devices of interest.
class Machine {
 public:
  Machine();
  ~Machine() { hwloc_topology_destroy(topology_); }
  Machine(const Machine&) = delete;
  Machine& operator=(const Machine&) = delete;

  /// Hardware threads this process may use.
  CpuSet allowed() const;
  /// Lets this process, and what it executes, use only `set`. Throws std::system_error.
  void bind(hwloc_const_cpuset_t set) const;
  /// Cores, not hardware threads, of which a part is in `set`, in the order of the machine.
  std::vector<CpuSet> cores(hwloc_const_cpuset_t set) const;

  /// NVIDIA GPUs in PCI order, which is CUDA's with CUDA_DEVICE_ORDER=PCI_BUS_ID.
  const std::vector<hwloc_obj_t>& gpus() const { return gpus_; }
  /// Hardware threads of the NUMA node that `device` is attached to.
  CpuSet near(hwloc_obj_t device) const;
  /// Names ("mlx5_0") of the InfiniBand and RoCE adapters with the fewest bridges and sockets between
  /// them and `device`.
  std::vector<std::string> nearest_nics(hwloc_obj_t device) const;
  size_t num_nics() const { return nics_.size(); }

 private:
  hwloc_topology_t topology_ = nullptr;
  std::vector<hwloc_obj_t> gpus_;
  std::vector<hwloc_obj_t> nics_;
};

}  // namespace anabranch::bind
