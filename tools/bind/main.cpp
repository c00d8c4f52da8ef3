// anabranch-bind COMMAND...: executes COMMAND as the rank that the launcher started, on its GPU and the
// cores and network adapter next to it. Between a launcher and any program:
//   mpirun -n 8 --bind-to none anabranch-bind train_lm ...

#include <anabranch/error.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <nlohmann/json.hpp>

#include "binding.h"

namespace anabranch::bind {
namespace {

constexpr const char* kDescription =
    "Executes COMMAND as the rank its launcher started (Open MPI, PMI, PMIx, Slurm, torchrun), "
    "bound\n"
    "to a GPU, to a share of the cores of that GPU's NUMA node, and to the nearest network "
    "adapter.\n"
    "Sets, unless they are set: OMP_NUM_THREADS, UCX_NET_DEVICES; always, where there are GPUs:\n"
    "CUDA_VISIBLE_DEVICES. The launcher itself must not bind (mpirun --bind-to none, srun\n"
    "--cpu-bind=none): its choice would be divided once more.";

nlohmann::json optional_number(const std::optional<int>& number) {
  return number ? nlohmann::json(*number) : nlohmann::json(nullptr);
}

nlohmann::json describe(const RankInfo& info, const Binding& binding) {
  return {{"rank", info.rank},
          {"size", info.size},
          {"local_rank", optional_number(info.local_rank)},
          {"local_size", optional_number(info.local_size)},
          {"node", info.node},
          {"launcher", info.launcher},
          {"cpus", to_list(binding.cpus.get())},
          {"cores", binding.cores},
          {"gpu", optional_number(binding.gpu)},
          {"visible_device", binding.visible_device},
          {"nic", binding.nic}};
}

void set_variable(const char* name, const std::string& value, bool overwrite) {
  if (setenv(name, value.c_str(), overwrite ? 1 : 0) != 0) {
    throw std::system_error(errno, std::generic_category(), std::string("setenv ") + name);
  }
}

void apply(const Machine& machine, const Binding& binding) {
  if (binding.cores > 0) {
    machine.bind(binding.cpus.get());
  }
  set_variable("OMP_NUM_THREADS", std::to_string(std::max(binding.cores, 1)), false);
  if (!binding.visible_device.empty()) {
    set_variable("CUDA_DEVICE_ORDER", "PCI_BUS_ID", false);
    set_variable("CUDA_VISIBLE_DEVICES", binding.visible_device, true);
  }
  if (!binding.nic.empty()) {
    set_variable("UCX_NET_DEVICES", binding.nic + ":1", false);
  }
}

[[noreturn]] void execute(const std::vector<std::string>& command) {
  std::vector<char*> words;
  for (const auto& word : command) {
    words.push_back(const_cast<char*>(word.c_str()));
  }
  words.push_back(nullptr);
  execvp(words[0], words.data());
  throw std::system_error(errno, std::generic_category(), "cannot execute '" + command[0] + "'");
}

int run(int argc, char** argv) {
  CLI::App app(kDescription, "anabranch-bind");
  bool show = false;
  app.add_flag("--show", show,
               "print this rank, and what it would be bound to, as JSON; no COMMAND");
  app.prefix_command();
  CLI11_PARSE(app, argc, argv);
  std::vector<std::string> command = app.remaining();
  if (!command.empty() && command.front() == "--") {
    command.erase(command.begin());
  }
  if (command.empty() && !show) {
    std::cerr << app.help();
    return 2;
  }
  const auto environment = process_environment();
  const RankInfo info = discover_rank();
  if (!info.local_rank || !info.local_size) {
    throw InputError(info.launcher + " does not say which rank of its node this is");
  }
  const Machine machine;
  const Binding binding = choose_binding(machine, *info.local_rank, *info.local_size, environment);
  if (show) {
    std::cout << describe(info, binding).dump() + "\n" << std::flush;
    return 0;
  }
  apply(machine, binding);
  execute(command);
}

}  // namespace
}  // namespace anabranch::bind

int main(int argc, char** argv) {
  try {
    return anabranch::bind::run(argc, argv);
  } catch (const std::exception& error) {
    std::cerr << std::string("anabranch-bind: ") + error.what() + "\n";
    return 127;
  }
}
