// Trains a Mixture-of-Experts language model on any text: data parallel over all ranks, its experts
// spread over them.  mpirun -n 2 train_lm --data FILE   (--help tells all)

#include <ATen/Context.h>
#include <ATen/SDPBackend.h>
#include <anabranch/communicator.h>
#include <anabranch/error.h>
#include <anabranch/hierarchical.h>
#include <anabranch/optimizers.h>
#include <anabranch/rank_discovery.h>

#include <chrono>
#include <fstream>
#include <functional>
#include <iostream>
#include <nlohmann/json.hpp>

#include "agreement.h"
#include "data/data.h"
#include "huggingface/folder.h"
#include "model/inference.h"
#include "interrupt.h"
#include "model/model.h"
#include "optimizer.h"
#include "options.h"
#include "metrics/progress.h"
#include "require.h"
#include "run_directory.h"
#include "sample.h"
#include "trainer.h"

namespace train_lm {
namespace {

constexpr int kFailed = 1;
constexpr int kRefused = 2;
constexpr int kSignalBase = 128;

anabranch::CommunicatorOptions communicator_options(const Options& options) {
  return {std::chrono::seconds(options.deadline)};
}

/// The same ranks for tensors on the device: each has a GPU of its host's to itself, as far as they
/// go, and `options.device` says which. Collective.
std::shared_ptr<anabranch::Communicator> move_to_device(
    Options& options, const std::shared_ptr<anabranch::Communicator>& world) {
  if (options.device == "cpu") {
    return world;
  }
  together(*world, [&] {
    const auto gpus = static_cast<int>(at::getNumGPUs());
    require(at::hasCUDA() && gpus > 0, "--device cuda: no GPU is to be seen");
    const int place = anabranch::discover_rank().local_rank.value_or(world->rank());
    options.device = c10::str("cuda:", place % gpus);
  });
  return anabranch::make_nccl_communicator(world, torch::Device(options.device),
                                           communicator_options(options));
}

/// Attention's kernels on a GPU, the first that can takes it.
void prefer_attention(const std::string& first) {
  using at::SDPBackend;
  std::vector<int64_t> order;
  if (first == "cudnn") {
    order.push_back(static_cast<int64_t>(SDPBackend::cudnn_attention));
  }
  for (const auto backend :
       {SDPBackend::flash_attention, SDPBackend::efficient_attention, SDPBackend::math}) {
    order.push_back(static_cast<int64_t>(backend));
  }
  at::globalContext().setSDPUseCuDNN(first == "cudnn");
  at::globalContext().setSDPPriorityOrder(order);
}

/// Its all-to-all as --all-to-all says. Collective.
std::shared_ptr<anabranch::Communicator> with_all_to_all(
    const Options& options, std::shared_ptr<anabranch::Communicator> world) {
  if (options.all_to_all == "flat") {
    return world;
  }
  anabranch::HierarchicalOptions hierarchical;
  hierarchical.all_to_all = options.all_to_all == "auto" ? anabranch::AllToAll::kAuto
                                                         : anabranch::AllToAll::kHierarchical;
  return anabranch::make_hierarchical_communicator(std::move(world), hierarchical);
}

/// Refuses ranks that see different data under one name.
void check_same_data(const TokenSource& data, anabranch::Communicator& world) {
  const auto hash = std::hash<std::string>()(data.identity().dump());
  const auto mine = at::tensor({static_cast<int64_t>(hash)}, at::kLong);
  const torch::Tensor all = world.all_gather(mine);
  for (int64_t rank = 1; rank < world.size(); ++rank) {
    if (!all[rank].equal(all[0])) {
      throw Refusal(c10::str("--data is something else on rank ", rank, " than on rank 0"));
    }
  }
}

void write_sample(LanguageModel& model, const Options& options, const RunDirectory& directory,
                  anabranch::Communicator& world, Progress& progress) {
  const std::string text = sample_text(model, options, options.training.sequence_length, world);
  on_rank_zero(world, [&] {
    std::ofstream file;
    file.exceptions(std::ios::failbit | std::ios::badbit);
    file.open(directory.sample(), std::ios::binary);
    file << text << std::endl;
  });
  progress.say("\n" + text + "\n");
}

/// The data, once every rank has found it and the options good.
std::unique_ptr<TokenSource> check_and_open(const Options& options,
                                            anabranch::Communicator& world) {
  std::unique_ptr<TokenSource> data;
  together(world, [&] {
    check_options(options, world.size());
    data = open_token_source(options.data, options.training.sequence_length, options.training.seed);
    require(data->vocabulary() <= options.model.vocabulary, "--data has a vocabulary of ",
            data->vocabulary(), ", the model one of ", options.model.vocabulary, " (--vocabulary)");
  });
  check_same_data(*data, world);
  return data;
}

std::string greeting(const Options& options, const RunState& state, const TokenSource& data,
                     const anabranch::Communicator& world) {
  return c10::str(options.resume ? "resuming after step " : "training from step ", state.step,
                  " of ", options.training.steps, " on ", world.size(),
                  world.size() == 1 ? " rank (" : " ranks (", world.name(), ", ",
                  torch::Device(options.device).type(), "), ", data.summary());
}

/// The whole run, on every rank; returns the exit code.
int train(const Options& options, const std::shared_ptr<anabranch::Communicator>& world) {
  const auto data = check_and_open(options, *world);
  const auto groups = anabranch::make_parallel_groups(world, options.expert_parallel);
  LanguageModel model(options, groups.expert_parallel);
  if (!options.load_hf.empty()) {
    load_hf(options.load_hf, model, options.model, groups);
  }
  const auto parameters = anabranch::trained_parameters(*model, groups);
  const auto optimizer = make_optimizer(parameters, groups, options);

  const RunDirectory directory(options, *data);
  std::vector<std::string> notes;
  RunState state;
  if (options.resume) {
    state = directory.resume(*model, *optimizer, groups, notes);
  } else {
    directory.begin(*world);
  }
  Progress progress(world->rank() != 0, options.progress, state.step, options.training.steps);
  for (const auto& note : notes) {
    progress.say("note: the run was begun with " + note);
  }
  progress.say(greeting(options, state, *data, *world));

  Trainer trainer(options, *data, groups, model, parameters, *optimizer, directory);
  const Outcome outcome = trainer.run(state, progress);
  if (outcome.diverged) {
    progress.say("the last steps' gradients are not finite" +
                 (options.no_save
                      ? std::string("; nothing is saved (--no-save)")
                      : "; what was before them is saved in " + directory.checkpoint().string()));
    return kFailed;
  }
  if (!outcome.complete) {
    progress.say(c10::str("stopped after step ", outcome.last.step) +
                 (options.no_save ? std::string(", nothing is saved (--no-save)")
                                  : ", saved in " + directory.checkpoint().string() +
                                        "; to continue: the same command with --resume"));
    return outcome.signal == 0 ? 0 : kSignalBase + outcome.signal;
  }
  if (!options.save_hf.empty()) {
    save_hf(options.save_hf, model, options, groups);
  }
  if (options.sample.length > 0) {
    write_sample(model, options, directory, *world, progress);
  }
  progress.say(c10::str(options.no_save ? "metrics and sample" : "metrics, sample and checkpoint",
                        " are in ", options.output.string()));
  return 0;
}

/// Waits until every rank has come this far, so that nothing is lost when the first to leave with
/// an exit code other than 0 has the job ended. Its leaving may overtake its last message here.
int leave_together(int exit_code, anabranch::Communicator& world) {
  try {
    world.barrier();
  } catch (const anabranch::CommunicationError&) {
    if (exit_code == 0) {
      throw;
    }
  }
  return exit_code;
}

int run(int argc, char** argv, std::shared_ptr<anabranch::Communicator>& world) {
  CommandLine command_line = parse_command_line(argc, argv);
  world = anabranch::make_mpi_communicator(communicator_options(command_line.options));
  try {
    if (command_line.train) {
      Options& options = command_line.options;
      world = with_all_to_all(options, move_to_device(command_line.options, world));
      prefer_attention(options.attention);
      if (options.generate || options.evaluate) {
        use_model(options, world);
        return leave_together(0, *world);
      }
      return leave_together(train(options, world), *world);
    }
    if (world->rank() == 0) {
      (command_line.exit_code == 0 ? std::cout : std::cerr) << command_line.message << std::flush;
    }
    return leave_together(command_line.exit_code, *world);
  } catch (const Refusal& refusal) {
    if (world->rank() == 0) {
      std::cerr << "error: " << refusal.what() << std::endl;
    }
    return leave_together(kRefused, *world);
  }
}

}  // namespace
}  // namespace train_lm

int main(int argc, char** argv) {
  std::shared_ptr<anabranch::Communicator> world;
  const auto fail = [&world](const char* message) {
    const std::string rank = world ? std::to_string(world->rank()) : "?";
    std::cerr << "rank " + rank + ": error: " + message + '\n' << std::flush;
    return train_lm::kFailed;
  };
  try {
    // Before anything that takes long: who is told to end while the ranks still start saves and leaves too.
    train_lm::remember_interrupts();
    return train_lm::run(argc, argv, world);
  } catch (const c10::Error& error) {
    return fail(error.what_without_backtrace());
  } catch (const std::exception& error) {
    return fail(error.what());
  }
}
