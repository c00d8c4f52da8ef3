#include "ranks/ranks.h"

#include <ATen/Context.h>
#include <ATen/ops/tensor.h>
#include <anabranch/rank_discovery.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <chrono>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <utility>

#include "communicator/agreement.h"

namespace anabranch::benchmark {

torch::Device rank_device(const std::string& name) {
  if (name != "cuda") {
    return torch::Device(name);
  }
  const int gpus = at::hasCUDA() ? static_cast<int>(at::getNumGPUs()) : 0;
  if (gpus == 0) {
    throw std::runtime_error("--device cuda: no GPU is to be seen");
  }
  const RankInfo rank = discover_rank();
  const int place = rank.local_rank.value_or(rank.rank);
  return torch::Device(torch::kCUDA, static_cast<c10::DeviceIndex>(place % gpus));
}

std::shared_ptr<Communicator> make_world(AllToAll way, torch::Device device) {
  if (discover_rank().launcher.empty()) {
    return make_self_communicator();
  }
  auto world = make_mpi_communicator();
  if (device.is_cuda()) {
    world = make_nccl_communicator(std::move(world), device);
  }
  if (way == AllToAll::kFlat) {
    return world;
  }
  HierarchicalOptions options;
  options.all_to_all = way;
  return make_hierarchical_communicator(std::move(world), options);
}

double seconds_from_barrier(Communicator& world, torch::Device device,
                            const std::function<void()>& call) {
  world.barrier();
  const auto begin = std::chrono::steady_clock::now();
  call();
  if (!device.is_cpu()) {
    c10::impl::VirtualGuardImpl(device.type()).getStream(device).synchronize();
  }
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

std::vector<double> over_ranks_max(Communicator& world, const std::vector<double>& values) {
  const auto most = std::get<0>(world.all_gather(at::tensor(values, at::kDouble)).max(0));
  const auto* data = most.const_data_ptr<double>();
  return {data, data + most.numel()};
}

std::vector<std::string> nodes(Communicator& world) {
  return all_gather_strings(world, discover_rank().node);
}

void write_record(const Json& record, const std::string& file) {
  if (file.empty()) {
    std::cout << record.dump() << std::endl;
    return;
  }
  std::ofstream stream(file, std::ios::app);
  stream << record.dump() << '\n';
  if (!stream.flush()) {
    throw std::runtime_error("cannot write " + file);
  }
}

}  // namespace anabranch::benchmark
