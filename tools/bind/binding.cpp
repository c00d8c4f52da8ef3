#include "binding.h"

#include <algorithm>
#include <sstream>
#include <vector>

namespace anabranch::bind {
namespace {

/// The words of CUDA_VISIBLE_DEVICES: numbers or UUIDs; without the variable, all GPUs' numbers.
std::vector<std::string> visible_devices(const Machine& machine, const Environment& environment) {
  std::vector<std::string> devices;
  const auto given = environment.find("CUDA_VISIBLE_DEVICES");
  if (given == environment.end()) {
    for (size_t i = 0; i < machine.gpus().size(); ++i) {
      devices.push_back(std::to_string(i));
    }
    return devices;
  }
  std::istringstream words(given->second);
  for (std::string word; std::getline(words, word, ',');) {
    devices.push_back(word);
  }
  return devices;
}

/// The number of a GPU of this machine; none where a container or Slurm has renamed them (UUIDs).
std::optional<int> gpu_number(const Machine& machine, const std::string& device) {
  const bool digits = !device.empty() && device.size() < 5 &&
                      device.find_first_not_of("0123456789") == std::string::npos;
  if (!digits || static_cast<size_t>(std::stoi(device)) >= machine.gpus().size()) {
    return std::nullopt;
  }
  return std::stoi(device);
}

/// What a rank may use: its GPU's NUMA node, where this process is allowed on a part of it.
CpuSet home(const Machine& machine, std::optional<int> gpu) {
  CpuSet allowed = machine.allowed();
  if (gpu) {
    const CpuSet near = machine.near(machine.gpus()[*gpu]);
    if (hwloc_bitmap_intersects(near.get(), allowed.get()) != 0) {
      hwloc_bitmap_and(allowed.get(), allowed.get(), near.get());
    }
  }
  return allowed;
}

std::optional<int> gpu_of(const Machine& machine, const std::vector<std::string>& devices,
                          int local_rank) {
  return devices.empty() ? std::nullopt : gpu_number(machine, devices[local_rank % devices.size()]);
}

}  // namespace

Binding choose_binding(const Machine& machine, int local_rank, int local_size,
                       const Environment& environment) {
  const auto devices = visible_devices(machine, environment);
  Binding binding;
  if (!devices.empty()) {
    binding.visible_device = devices[local_rank % devices.size()];
    binding.gpu = gpu_of(machine, devices, local_rank);
  }
  binding.cpus = home(machine, binding.gpu);

  // The ranks that share these cores, and this one's place among them.
  size_t sharers = 0, place = 0;
  for (int rank = 0; rank < local_size; ++rank) {
    const CpuSet theirs = home(machine, gpu_of(machine, devices, rank));
    if (hwloc_bitmap_isequal(theirs.get(), binding.cpus.get()) != 0) {
      place += rank < local_rank ? 1 : 0;
      ++sharers;
    }
  }
  const auto cores = machine.cores(binding.cpus.get());
  if (cores.size() >= sharers) {
    hwloc_bitmap_zero(binding.cpus.get());
    const size_t end = cores.size() * (place + 1) / sharers;
    for (size_t i = cores.size() * place / sharers; i < end; ++i) {
      hwloc_bitmap_or(binding.cpus.get(), binding.cpus.get(), cores[i].get());
      ++binding.cores;
    }
  }
  if (binding.gpu && machine.num_nics() > 1) {
    const auto nics = machine.nearest_nics(machine.gpus()[*binding.gpu]);
    binding.nic = nics[place % nics.size()];
  }
  return binding;
}

}  // namespace anabranch::bind
