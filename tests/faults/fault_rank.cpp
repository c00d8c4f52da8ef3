// One rank of a job in which something goes wrong: fault_rank SCENARIO DEADLINE_MS [mpi|nccl|peer_memory] [CULPRIT]
//
// Says on standard error how it ended, as one line: "ended rank=0 seconds=2.0 peers=2 what=...".
#include <ATen/Context.h>
#include <anabranch/communicator.h>
#include <anabranch/error.h>
#include <anabranch/gradient_reducer.h>
#include <anabranch/moe_layer.h>
#include <mpi.h>
#include <sys/wait.h>
#include <torch/types.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "support/failing_allocator.h"

namespace {

using anabranch::Communicator;
using std::chrono::milliseconds;
using Clock = std::chrono::steady_clock;

/// The rank that every scenario with one culprit has it in.
int culprit = 2;

milliseconds deadline;
torch::Device device(torch::kCPU);
Clock::time_point began;

/// Rows between all pairs of ranks, some of them longer than MPI sends without a handshake.
void exchange_once(Communicator& communicator) {
  const std::vector<int64_t> rows(communicator.size(), 100);
  const int64_t total = 100 * communicator.size();
  const at::Tensor narrow = at::ones({total, 16}, device);
  const at::Tensor wide = at::ones({total, 4096}, device);
  const at::Tensor received = at::empty_like(wide);
  communicator.all_to_all_v(
      {{narrow, rows, at::empty_like(narrow), rows}, {wide, rows, received, rows}});
  received.select(0, 0).cpu();  // waits for a stream
  communicator.check();
}

void exchange_for_ever(Communicator& communicator) {
  while (true) {
    exchange_once(communicator);
  }
}

/// Sends the culprit `signal` after 300 ms, in the middle of whatever it does. Time counts from now.
void schedule(const Communicator& communicator, int signal) {
  began = Clock::now();
  if (communicator.rank() == culprit) {
    std::thread([signal] {
      std::this_thread::sleep_for(milliseconds(300));
      kill(getpid(), signal);
    }).detach();
  }
}

void killed(Communicator& communicator) {
  exchange_once(communicator);
  schedule(communicator, SIGKILL);
  exchange_for_ever(communicator);
}

void stalled(Communicator& communicator) {
  exchange_once(communicator);
  schedule(communicator, SIGSTOP);
  exchange_for_ever(communicator);
}

anabranch::MoEOptions layer_options() {
  anabranch::MoEOptions options;
  options.hidden_size = 64;
  options.expert_hidden_size = 128;
  options.num_experts = 8;
  options.top_k = 2;
  options.device = device;
  return options;
}

/// Non-owning: main's communicator outlives the layer.
std::shared_ptr<Communicator> share(Communicator& communicator) {
  return {std::shared_ptr<void>(), &communicator};
}

/// How a step's rows or weights travel.
struct Way {
  std::string overlap = "off";
  std::string balance = "off";
  int64_t num_experts = layer_options().num_experts;
  bool sliced = false;  ///< and rows in rounds
};

void killed_in_a_training_step(Communicator& communicator, const Way& way) {
  anabranch::MoEOptions options = layer_options();
  options.overlap = way.overlap;
  options.balance = way.balance;
  options.num_experts = way.num_experts;
  if (way.sliced) {
    options.placement = "sliced";
    options.receive_rows_limit = 50;
  }
  anabranch::MoELayer layer(options, share(communicator));
  const auto step = [&] {
    const auto x = torch::randn({200, 64}, device).requires_grad_();
    layer->forward(x).output.sum().backward();
  };
  step();  // of which engines and connections come, slowly where ranks share a GPU
  communicator.barrier();
  schedule(communicator, SIGKILL);
  while (true) step();
}

/// Two threads of each rank wait: backward's, and the one that sums gradients.
void killed_while_gradients_are_summed(Communicator& communicator) {
  const auto groups = anabranch::make_parallel_groups(share(communicator));
  anabranch::MoELayer layer(layer_options(), groups.expert_parallel);
  anabranch::GradientReducer reducer(*layer, groups, /*bucket_bytes=*/1);
  const auto step = [&] {
    layer->zero_grad();
    const auto loss = layer->forward(torch::randn({200, 64}, device)).output.sum();
    reducer.start();
    loss.backward();
    reducer.finish();
  };
  step();
  communicator.barrier();
  schedule(communicator, SIGKILL);
  while (true) step();
}

/// Comes when the others have given up.
void late(Communicator& communicator) {
  if (communicator.rank() == culprit) {
    std::this_thread::sleep_for(2 * deadline);
  }
  at::Tensor sum = at::ones({10}, device);
  communicator.all_reduce(sum);
  communicator.barrier();
}

/// Every rank needs longer for its own work than collectives may wait, but all do.
void slow_together(Communicator& communicator) {
  std::this_thread::sleep_for(2 * deadline);
  communicator.barrier();
}

/// For some seconds, and then it is done. Whoever stops the ranks meanwhile waits for the line.
void exchange_for_a_while(Communicator& communicator) {
  for (int i = 0; i < 200; ++i) {
    exchange_once(communicator);
    std::this_thread::sleep_for(milliseconds(10));
    if (i == 0) {
      std::fprintf(stderr, "exchanging\n");
    }
  }
}

void leaves(Communicator& communicator) {
  if (communicator.rank() != culprit) {
    communicator.barrier();
  }
}

void throws(Communicator& communicator) {
  exchange_once(communicator);
  if (communicator.rank() == culprit) {
    throw std::runtime_error("no more data");
  }
  exchange_for_ever(communicator);
}

void other_options(Communicator& communicator) {
  anabranch::MoEOptions options = layer_options();
  options.top_k = communicator.rank() == culprit ? 3 : 2;
  const anabranch::MoELayer layer(options, share(communicator));
}

void other_calls(Communicator& communicator) {
  if (communicator.rank() == culprit) {
    communicator.barrier();
  } else {
    at::Tensor sum = at::ones({10});
    communicator.all_reduce(sum);
  }
}

void other_shapes(Communicator& communicator) {
  communicator.all_gather(at::ones({communicator.rank() == culprit ? 5 : 4}));
}

/// The culprit leaves a group that the others go on to use, and lives on.
void destroyed(Communicator& communicator) {
  std::shared_ptr<Communicator> group = communicator.split(0, communicator.rank());
  exchange_once(*group);
  communicator.barrier();
  began = Clock::now();
  if (communicator.rank() == culprit) {
    group.reset();
    std::this_thread::sleep_for(2 * deadline);
    return;
  }
  exchange_for_ever(*group);
}

/// Every rank has a child that ends by itself, as a helper process of a program's does; then all go on.
void forks(Communicator& communicator) {
  exchange_once(communicator);
  const pid_t child = fork();
  if (child == 0) {
    std::exit(0);
  }
  int status = 0;
  if (child < 0 || waitpid(child, &status, 0) != child || status != 0) {
    throw std::runtime_error(c10::str("the child ended with status ", status));
  }
  for (int i = 0; i < 3; ++i) {
    exchange_once(communicator);
  }
  communicator.barrier();
}

/// The culprit is refused memory in the middle of backward, and ends by the exception.
void out_of_memory(Communicator& communicator) {
  anabranch::MoELayer layer(layer_options(), share(communicator));
  anabranch::test::FailingAllocator memory;
  for (int step = 0;; ++step) {
    const auto x = torch::randn({200, 64}).requires_grad_();
    const auto loss = layer->forward(x).output.sum();
    if (communicator.rank() == culprit && step == 3) {
      memory.fail_after(10);
    }
    loss.backward();
  }
}

/// The culprit dies before the first collective of all, which is `collective`.
void first(Communicator& communicator, const std::function<void(Communicator&)>& collective) {
  if (communicator.rank() == culprit) {
    raise(SIGKILL);
  }
  collective(communicator);
  communicator.barrier();  // a broadcast may have had no need of it
}

const std::map<std::string, std::function<void(Communicator&)>> collectives = {
    {"first_all_gather", [](Communicator& c) { c.all_gather(at::ones({3}, device)); }},
    {"first_all_reduce",
     [](Communicator& c) {
       at::Tensor sum = at::ones({3}, device);
       c.all_reduce(sum);
     }},
    {"first_all_to_all_v", exchange_once},
    {"first_barrier", [](Communicator& c) { c.barrier(); }},
    {"first_broadcast",
     [](Communicator& c) {
       at::Tensor token = at::ones({3}, device);
       c.broadcast(token, 0);
     }},
    {"first_split", [](Communicator& c) { c.split(0, c.rank()); }},
};

/// Rank 3 waits for 0, in the world, 0 for 1, in a group of two, 1 for 2, in another, and 2 is dead.
void chain(Communicator& communicator) {
  const int rank = communicator.rank();
  const auto front = communicator.split(rank <= 1 ? 0 : 1, rank);
  const auto middle = communicator.split(rank == 1 || rank == 2 ? 0 : 1, rank);
  if (rank == culprit) {
    raise(SIGKILL);
  }
  // The first to lose patience is the rank farthest from the culprit.
  const std::map<int, int> tenths = {{3, 0}, {0, 1}, {1, 2}};
  std::this_thread::sleep_for(tenths.at(rank) * deadline / 10);
  at::Tensor token = at::ones({1});
  if (rank == 1) {
    middle->broadcast(token, 1);
  }
  if (rank <= 1) {
    front->broadcast(token, 1);
  }
  communicator.broadcast(token, 0);
}

/// The culprit starts MPI, but makes no communicator before the others have given up.
void stay_away() {
  int level = 0;
  MPI_Init_thread(nullptr, nullptr, MPI_THREAD_MULTIPLE, &level);
  int rank = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  if (rank == culprit) {
    std::this_thread::sleep_for(2 * deadline);
  }
}

/// The culprit stays away while the others make an NCCL group.
std::shared_ptr<Communicator> start_nccl(const std::shared_ptr<Communicator>& mpi,
                                         const std::string& scenario, bool peer_memory) {
  const char* local = std::getenv("OMPI_COMM_WORLD_LOCAL_RANK");
  const int gpus = static_cast<int>(at::getNumGPUs());
  device = torch::Device(torch::kCUDA,
                         static_cast<c10::DeviceIndex>(std::atoi(local ? local : "0") % gpus));
  if (scenario == "absent_from_nccl" && mpi->rank() == culprit) {
    std::this_thread::sleep_for(2 * deadline);
  }
  return anabranch::make_nccl_communicator(mpi, device, {deadline, peer_memory});
}

const std::map<std::string, std::function<void(Communicator&)>> scenarios = {
    {"absent", [](Communicator& communicator) { communicator.barrier(); }},
    {"absent_from_nccl", [](Communicator& communicator) { communicator.barrier(); }},
    {"killed", killed},
    {"killed_in_a_training_step", [](Communicator& c) { killed_in_a_training_step(c, {}); }},
    {"killed_in_a_step_in_chunks",
     [](Communicator& c) { killed_in_a_training_step(c, {.overlap = "2"}); }},
    {"killed_in_a_step_in_pairs",
     [](Communicator& c) {
       killed_in_a_training_step(c, {.overlap = "4", .num_experts = c.size()});
     }},
    {"killed_while_weights_travel",
     [](Communicator& c) { killed_in_a_training_step(c, {.balance = "gather"}); }},
    {"killed_while_weights_travel_beside",
     [](Communicator& c) {
       killed_in_a_training_step(c, {.overlap = "1", .balance = "gather:2"});
     }},
    {"killed_in_rounds_of_slices",
     [](Communicator& c) { killed_in_a_training_step(c, {.num_experts = 2, .sliced = true}); }},
    {"killed_while_gradients_are_summed", killed_while_gradients_are_summed},
    {"stalled", stalled},
    {"late", late},
    {"destroyed", destroyed},
    {"forks", forks},
    {"out_of_memory", out_of_memory},
    {"slow_together", slow_together},
    {"exchange_for_a_while", exchange_for_a_while},
    {"leaves", leaves},
    {"throws", throws},
    {"other_options", other_options},
    {"other_calls", other_calls},
    {"other_shapes", other_shapes},
    {"chain", chain},
};

void report(const std::vector<int>& peers, const std::string& what) {
  std::string line =
      c10::str("ended rank=", std::getenv("OMPI_COMM_WORLD_RANK"),
               " seconds=", std::chrono::duration<double>(Clock::now() - began).count(), " peers=");
  for (size_t i = 0; i < peers.size(); ++i) {
    line += c10::str(i == 0 ? "" : ",", peers[i]);
  }
  std::fprintf(stderr, "%s what=%s\n", line.c_str(), what.c_str());
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr,
                 "usage: fault_rank SCENARIO DEADLINE_MS [mpi|nccl|peer_memory] [CULPRIT]\n");
    return 2;
  }
  const std::string kind = argc > 3 ? argv[3] : "mpi";
  if (argc > 4) {
    culprit = std::atoi(argv[4]);
  }
  deadline = milliseconds(std::stol(argv[2]));
  const std::string scenario = argv[1];
  // Outlives the exception, as in most programs.
  std::shared_ptr<Communicator> communicator;
  try {
    if (scenario == "absent") {
      stay_away();
    }
    began = Clock::now();
    communicator = anabranch::make_mpi_communicator({deadline});
    if (kind != "mpi") {
      communicator = start_nccl(communicator, scenario, kind == "peer_memory");
      communicator->barrier();
      began = Clock::now();
    }
    if (collectives.contains(scenario)) {
      first(*communicator, collectives.at(scenario));
    } else {
      scenarios.at(scenario)(*communicator);
    }
  } catch (const anabranch::CommunicationError& error) {
    report(error.peers(), error.what());
    return 1;
  } catch (const std::exception& error) {
    report({}, error.what());
    return 1;
  }
  report({}, "nothing");
  return 0;
}
