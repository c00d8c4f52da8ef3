#include "machine.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <new>
#include <system_error>

namespace anabranch::bind {
namespace {

constexpr unsigned kNvidia = 0x10de;
constexpr unsigned kDisplayClass = 0x03;  // upper byte of a PCI class: VGA and 3D controllers

void check(bool succeeded, const char* call) {
  if (!succeeded) {
    throw std::system_error(errno, std::generic_category(), call);
  }
}

CpuSet empty_set() {
  CpuSet set(hwloc_bitmap_alloc());
  if (!set) {
    throw std::bad_alloc();
  }
  return set;
}

bool is_gpu(hwloc_obj_t device) {
  const auto& pci = device->attr->pcidev;
  return pci.vendor_id == kNvidia && pci.class_id >> 8 == kDisplayClass;
}

/// Steps from `from` and from `to` up to the lowest object that both hang from.
size_t distance(hwloc_obj_t from, hwloc_obj_t to) {
  std::vector<hwloc_obj_t> ancestors;
  for (; from != nullptr; from = from->parent) {
    ancestors.push_back(from);
  }
  for (size_t steps = 0; to != nullptr; to = to->parent, ++steps) {
    const auto found = std::find(ancestors.begin(), ancestors.end(), to);
    if (found != ancestors.end()) {
      return steps + static_cast<size_t>(found - ancestors.begin());
    }
  }
  return ancestors.size();
}

}  // namespace

CpuSet copy(hwloc_const_cpuset_t set) {
  CpuSet duplicate(hwloc_bitmap_dup(set));
  if (!duplicate) {
    throw std::bad_alloc();
  }
  return duplicate;
}

std::string to_list(hwloc_const_cpuset_t set) {
  char* text = nullptr;
  check(hwloc_bitmap_list_asprintf(&text, set) >= 0, "hwloc_bitmap_list_asprintf");
  std::string list = text;
  std::free(text);
  return list;
}

Machine::Machine() {
  check(hwloc_topology_init(&topology_) == 0, "hwloc_topology_init");
  check(hwloc_topology_set_io_types_filter(topology_, HWLOC_TYPE_FILTER_KEEP_ALL) == 0,
        "hwloc_topology_set_io_types_filter");
  check(hwloc_topology_load(topology_) == 0, "hwloc_topology_load");
  for (hwloc_obj_t device = nullptr;
       (device = hwloc_get_next_pcidev(topology_, device)) != nullptr;) {
    if (is_gpu(device)) {
      gpus_.push_back(device);
    }
  }
  const auto address = [](hwloc_obj_t device) {
    const auto& pci = device->attr->pcidev;
    return std::tuple(pci.domain, pci.bus, pci.dev, pci.func);
  };
  std::sort(gpus_.begin(), gpus_.end(),
            [&](auto left, auto right) { return address(left) < address(right); });
  for (hwloc_obj_t device = nullptr;
       (device = hwloc_get_next_osdev(topology_, device)) != nullptr;) {
    if (device->attr->osdev.type == HWLOC_OBJ_OSDEV_OPENFABRICS) {
      nics_.push_back(device);
    }
  }
}

CpuSet Machine::allowed() const {
  CpuSet set = empty_set();
  const bool this_machine = hwloc_topology_is_thissystem(topology_) != 0;
  if (this_machine && hwloc_get_cpubind(topology_, set.get(), HWLOC_CPUBIND_PROCESS) == 0) {
    return set;
  }
  return copy(hwloc_topology_get_allowed_cpuset(topology_));
}

void Machine::bind(hwloc_const_cpuset_t set) const {
  check(hwloc_set_cpubind(topology_, set, HWLOC_CPUBIND_PROCESS) == 0, "hwloc_set_cpubind");
}

std::vector<CpuSet> Machine::cores(hwloc_const_cpuset_t set) const {
  std::vector<CpuSet> found;
  hwloc_obj_t core = nullptr;
  while ((core = hwloc_get_next_obj_by_type(topology_, HWLOC_OBJ_CORE, core)) != nullptr) {
    CpuSet part = empty_set();
    hwloc_bitmap_and(part.get(), core->cpuset, set);
    if (hwloc_bitmap_iszero(part.get()) == 0) {
      found.push_back(std::move(part));
    }
  }
  return found;
}

CpuSet Machine::near(hwloc_obj_t device) const {
  return copy(hwloc_get_non_io_ancestor_obj(topology_, device)->cpuset);
}

std::vector<std::string> Machine::nearest_nics(hwloc_obj_t device) const {
  std::vector<std::string> names;
  size_t least = SIZE_MAX;
  for (const auto nic : nics_) {
    // An adapter is one step below its own PCI device.
    const size_t steps = distance(device, nic->parent);
    if (steps < least) {
      least = steps;
      names.clear();
    }
    if (steps == least) {
      names.emplace_back(nic->name);
    }
  }
  return names;
}

}  // namespace anabranch::bind
