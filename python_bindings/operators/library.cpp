// Operators without tensors to compute on: groups of ranks, parameters, what there is.

#include <anabranch/build.h>
#include <anabranch/hierarchical.h>
#include <anabranch/memory_plan.h>
#include <anabranch/moe_layer.h>
#include <anabranch/process_group.h>
#include <anabranch/rank_discovery.h>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>

#include "communicator/agreement.h"
#include "moe_options.h"
#include "operators.h"
#include "options.h"
#include "parameters.h"
#include "plan.h"
#include "registry.h"

namespace anabranch::operators {
namespace {

std::vector<std::string> parameter_names(std::string options) {
  MoEParameters parameters;
  std::vector<std::string> names;
  for (const auto& parameter : named_parameters(parameters, options_from_json(options))) {
    names.emplace_back(parameter.name);
  }
  return names;
}

std::vector<at::Tensor> make_parameters(std::string options, int64_t rank, int64_t num_ranks,
                                        at::ScalarType dtype, at::Device device) {
  auto all = options_from_json(options);
  all.dtype = dtype;
  all.device = device;
  if (!device.is_meta()) {
    engine_for(device, all.engine);  // refuses names of none
  }
  return initial_parameters(all, rank, num_ranks);
}

/// The number of this rank's first place; expert, slice and slices of each that it has.
std::tuple<int64_t, std::vector<int64_t>> held_experts(std::string options, int64_t rank,
                                                       int64_t num_ranks) {
  const auto placement = placement_of(options_from_json(options), num_ranks);
  std::vector<int64_t> held;
  for (int64_t local = 0; local < placement.local_experts(rank); ++local) {
    const auto [expert, slice, slices] = placement.at(rank, local);
    held.insert(held.end(), {expert, slice, slices});
  }
  return {placement.first_place(rank), held};
}

void agree(std::string options, at::ScalarType dtype, at::Device device, std::string group) {
  // Whatever tensors the layer is made of, fake ones included, its ranks' messages are real.
  const c10::impl::ExcludeDispatchKeyGuard real(
      c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot}));
  auto all = options_from_json(options);
  all.dtype = dtype;
  all.device = device;
  agree_on_options(all, group_named(group));
}

std::string self_group(std::string name) { return register_group(name, make_self_communicator()); }

CommunicatorOptions deadline(double seconds) {
  TORCH_CHECK_VALUE(seconds > 0, "deadline = ", seconds, " s, expected more than 0");
  return {.deadline = std::chrono::milliseconds(static_cast<int64_t>(seconds * 1000))};
}

std::string mpi_group(std::string name, double seconds) {
  return register_group(name, make_mpi_communicator(deadline(seconds)));
}

std::string store_group(std::string name, std::string host, int64_t port, int64_t rank,
                        int64_t size, double seconds) {
  return register_group(
      name, make_store_communicator(host, static_cast<int>(port), static_cast<int>(rank),
                                    static_cast<int>(size), deadline(seconds)));
}

std::string nccl_group(std::string name, std::string group, at::Device device, double seconds) {
  return register_group(name,
                        make_nccl_communicator(group_named(group), device, deadline(seconds)));
}

/// Of torch.distributed, by the name it is registered by.
std::string process_group(std::string name, std::string group, double seconds) {
  return register_group(
      name, make_process_group_communicator(c10d::resolve_process_group(group), deadline(seconds)));
}

std::string split_group(std::string name, std::string group, int64_t color, int64_t key) {
  return register_group(name,
                        group_named(group)->split(static_cast<int>(color), static_cast<int>(key)));
}

/// The ranks of `group`, with rows that go within a node first; see hierarchical.h.
std::string hierarchical_group(std::string name, std::string group, std::string all_to_all,
                               std::string node) {
  static const std::map<std::string, AllToAll> ways = {{"auto", AllToAll::kAuto},
                                                       {"flat", AllToAll::kFlat},
                                                       {"hierarchical", AllToAll::kHierarchical}};
  const auto way = ways.find(all_to_all);
  TORCH_CHECK_VALUE(way != ways.end(), "all_to_all = '", all_to_all,
                    "', expected auto, flat or hierarchical");
  return register_group(
      name, make_hierarchical_communicator(group_named(group),
                                           {.all_to_all = way->second, .node = std::move(node)}));
}

/// Rank, ranks, kind.
std::tuple<int64_t, int64_t, std::string> describe_group(std::string group) {
  const auto communicator = group_named(group);
  return {communicator->rank(), communicator->size(), communicator->name()};
}

void all_reduce(at::Tensor tensor, std::string group) { group_named(group)->all_reduce(tensor); }

/// Of what rank 0 gathers, so much is in its device's memory at a time, or one row where that is more.
constexpr int64_t kGatheredBytes = int64_t{64} << 20;

/// The rows of all ranks in their order, in host memory, on rank 0; no rows elsewhere. Collective.
at::Tensor gather_rows(const at::Tensor& rows, std::string group) {
  const auto communicator = group_named(group);
  const int rank = communicator->rank();
  const at::Tensor mine = rows.contiguous();
  const at::Tensor count = at::full({1}, rows.size(0), rows.options().dtype(at::kLong));
  const at::Tensor counts = communicator->all_gather(count).cpu();
  const auto* rows_of = counts.const_data_ptr<int64_t>();

  auto sizes = rows.sizes().vec();
  sizes[0] = rank == 0 ? counts.sum().item<int64_t>() : 0;
  const at::Tensor gathered = at::empty(sizes, rows.options().device(at::kCPU));
  const int64_t row_bytes = c10::multiply_integers(rows.sizes().slice(1)) * rows.element_size();
  const int64_t chunk = std::max<int64_t>(1, kGatheredBytes / std::max<int64_t>(1, row_bytes));
  int64_t place = 0;
  for (int source = 0; source < communicator->size(); ++source) {
    for (int64_t begin = 0; begin < rows_of[source]; begin += chunk) {
      const int64_t size = std::min(chunk, rows_of[source] - begin);
      std::vector<int64_t> to(communicator->size(), 0), from(communicator->size(), 0);
      to[0] = rank == source ? size : 0;
      from[source] = rank == 0 ? size : 0;
      sizes[0] = from[source];
      const at::Tensor part = at::empty(sizes, rows.options());
      communicator->all_to_all_v({{mine.narrow(0, to[0] > 0 ? begin : 0, to[0]), to, part, from}});
      gathered.narrow(0, rank == 0 ? place : 0, sizes[0]).copy_(part);
      place += size;
    }
  }
  communicator->check();
  return gathered;
}

/// A RankInfo as a JSON object.
std::string discover() {
  const RankInfo info = discover_rank();
  nlohmann::json json = {
      {"rank", info.rank}, {"size", info.size}, {"node", info.node}, {"launcher", info.launcher}};
  if (info.local_rank) json["local_rank"] = *info.local_rank;
  if (info.local_size) json["local_size"] = *info.local_size;
  return json.dump();
}

/// A MemoryPlan as a JSON object; items of a list in their order.
std::string memory_plan(std::string options, at::ScalarType dtype, at::Device device,
                        int64_t tokens, int64_t ranks, double load) {
  auto all = options_from_json(options);
  all.dtype = dtype;
  all.device = device;
  const MemoryPlan plan = plan_memory(all, tokens, ranks, load);
  const auto listed = [](const std::vector<MemoryPlan::Item>& items) {
    nlohmann::ordered_json object = nlohmann::ordered_json::object();
    for (const auto& item : items) object[item.name] = item.bytes;
    return object;
  };
  const nlohmann::ordered_json json = {{"parameters", listed(plan.parameters)},
                                       {"saved", listed(plan.saved)},
                                       {"forward", listed(plan.forward)},
                                       {"backward", listed(plan.backward)},
                                       {"mailboxes", listed(plan.mailboxes)},
                                       {"peak", plan.peak()},
                                       {"text", plan.explain()}};
  return json.dump();
}

/// Unbounded for this thread, from here on or no longer.
void set_unbounded(bool unbounded) {
  thread_local std::optional<Unbounded> alive;
  if (unbounded) {
    alive.emplace();
  } else {
    alive.reset();
  }
}

void update_bias(at::Tensor expert_bias, const at::Tensor& expert_load, double rate) {
  update_expert_bias(expert_bias, expert_load, rate);
}

void update_bias_by_quantile(at::Tensor expert_bias, const at::Tensor& histogram, int64_t top_k,
                             double rate) {
  update_expert_bias_by_quantile(expert_bias, histogram, top_k, rate);
}

double load_imbalance(const at::Tensor& expert_load) { return imbalance(expert_load); }

std::string build() { return describe_build(); }

std::vector<std::string> engines(at::Device device) { return grouped_gemm_engines(device); }

}  // namespace

TORCH_LIBRARY(anabranch, library) {
  Operators operators(library);
  operators.def("default_options() -> str", default_options);
  operators.def("plan_fields() -> str[]", plan_fields);
  operators.def("parameter_names(str options) -> str[]", parameter_names);
  operators.def(
      "initial_parameters(str options, int rank, int num_ranks, ScalarType dtype, Device device) "
      "-> Tensor[]",
      make_parameters);
  operators.def("held_experts(str options, int rank, int num_ranks) -> (int, int[])", held_experts);
  operators.def(
      "plan_memory(str options, ScalarType dtype, Device device, int tokens, int ranks, float "
      "load) "
      "-> str",
      memory_plan);
  operators.def("check() -> ()", check);
  operators.def("take_exceeded_capacity() -> bool", take_exceeded_capacity);
  operators.def("set_unbounded(bool unbounded) -> ()", set_unbounded);
  operators.def("agree(str options, ScalarType dtype, Device device, str group) -> ()", agree);
  operators.def("self_group(str name) -> str", self_group);
  operators.def("mpi_group(str name, float deadline) -> str", mpi_group);
  operators.def(
      "store_group(str name, str host, int port, int rank, int size, float deadline) -> str",
      store_group);
  operators.def("nccl_group(str name, str group, Device device, float deadline) -> str",
                nccl_group);
  operators.def("process_group(str name, str group, float deadline) -> str", process_group);
  operators.def("split_group(str name, str group, int color, int key) -> str", split_group);
  operators.def("hierarchical_group(str name, str group, str all_to_all, str node) -> str",
                hierarchical_group);
  operators.def("release_group(str name) -> ()", release_group);
  operators.def("describe_group(str group) -> (int, int, str)", describe_group);
  operators.def("all_reduce(Tensor(a!) tensor, str group) -> ()", all_reduce);
  operators.def("gather_rows(Tensor rows, str group) -> Tensor", gather_rows);
  operators.def("discover_rank() -> str", discover);
  operators.def("describe_build() -> str", build);
  operators.def("update_expert_bias(Tensor(a!) expert_bias, Tensor expert_load, float rate) -> ()",
                update_bias);
  operators.def(
      "update_expert_bias_by_quantile(Tensor(a!) expert_bias, Tensor histogram, int top_k, float "
      "rate) -> ()",
      update_bias_by_quantile);
  operators.def("imbalance(Tensor expert_load) -> float", load_imbalance);
  operators.def("grouped_gemm_engines(Device device) -> str[]", engines);
}

}  // namespace anabranch::operators
