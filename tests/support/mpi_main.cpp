// main of every test program: the same tests run on each rank, in lockstep.
#include "support/world.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <anabranch/process_group.h>
#include <c10/util/StringUtil.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <iostream>
#include <map>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>

#include "communicator/describe.h"
#include "communicator/store/store.h"
#include "support/devices.h"
#include "support/process_group.h"

// There under AddressSanitizer, null elsewhere.
extern "C" {
int __lsan_do_recoverable_leak_check() __attribute__((weak));
void __lsan_disable() __attribute__((weak));
void __lsan_enable() __attribute__((weak));
}

namespace anabranch::test {
namespace {

// A rank that fails alone leaves the others waiting: they give up after kTestDeadline, and the
// harness, on a communicator of its own, waits for them.
constexpr auto kTestDeadline = std::chrono::seconds(60);
constexpr auto kHarnessDeadline = std::chrono::minutes(5);

struct Session {
  std::shared_ptr<Communicator> harness;
  std::shared_ptr<Communicator> world;
  std::map<int64_t, ParallelGroups> groups;  ///< of the world, by expert-parallel size
  std::string communicator;                  ///< as asked for
  uint64_t seed = 0;
};

Session& session() {
  static Session instance;
  return instance;
}

bool started_by_a_launcher() {
  return std::getenv("OMPI_COMM_WORLD_SIZE") != nullptr || std::getenv("PMI_SIZE") != nullptr ||
         std::getenv("PMIX_RANK") != nullptr;
}

/// MPI's ranks where a launcher started this, otherwise this process alone.
std::shared_ptr<Communicator> make_host_world(std::chrono::milliseconds deadline) {
  if (!started_by_a_launcher()) {
    return make_self_communicator();
  }
  CommunicatorOptions options;
  options.deadline = deadline;
  return make_mpi_communicator(options);
}

/// What --communicator names, where `nccl` moves all rows by NCCL. By default between GPUs NCCL's as a
/// user gets it, with peers' memory, and the launcher's otherwise.
std::shared_ptr<Communicator> make_world(const std::string& kind) {
  CommunicatorOptions options;
  options.deadline = kTestDeadline;
  Communicator& harness = *session().harness;
  if (kind == "store") {
    return make_store_communicator(open_shared_store(harness, options.deadline), harness.rank(),
                                   harness.size(), options);
  }
  if (kind == "process_group") {
    return make_process_group_communicator(make_process_group(harness, options.deadline), options);
  }
  auto host_world = make_host_world(options.deadline);
  if (kind.empty() && device().is_cuda() && host_world->size() == 1) {
    return make_self_communicator();
  }
  const bool between_gpus = kind.empty() && device().is_cuda() && host_world->size() > 1;
  if (kind == "nccl" || between_gpus) {
    options.peer_memory = between_gpus;
    return make_nccl_communicator(std::move(host_world), device(), options);
  }
  return host_world;
}

struct Arguments {
  std::optional<uint64_t> seed;
  std::string device;
  std::string communicator;
};

/// What GoogleTest does not know.
Arguments parse(int argc, char** argv) {
  Arguments arguments;
  if (const char* value = std::getenv("ANABRANCH_TEST_SEED")) {
    arguments.seed = std::stoull(value);
  }
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const auto value_of = [&](const std::string& name) -> std::optional<std::string> {
      if (argument.rfind(name + "=", 0) == 0) {
        return argument.substr(name.size() + 1);
      }
      if (argument == name && i + 1 < argc) {
        return argv[++i];
      }
      return std::nullopt;
    };
    if (const auto seed = value_of("--seed")) {
      arguments.seed = std::stoull(*seed);
    } else if (const auto device = value_of("--device")) {
      arguments.device = *device;
    } else if (const auto communicator = value_of("--communicator")) {
      arguments.communicator = *communicator;
    } else if (argument.rfind("--gtest_", 0) != 0) {
      throw std::invalid_argument("unknown argument '" + argument +
                                  "'; known: --seed N, --device cpu|cuda, "
                                  "--communicator mpi|store|nccl|process_group, "
                                  "--gtest_*");
    }
  }
  return arguments;
}

/// Why no test can run on the device that was asked for; empty if they can.
std::string obstacle(const std::string& communicator) {
  if (!device().is_cuda()) {
    return "";
  }
  if (!have_cuda()) {
    return "there is no GPU, or this build has no CUDA";
  }
  const char* value = std::getenv("OMPI_COMM_WORLD_LOCAL_SIZE");
  const int ranks = value == nullptr ? 1 : std::atoi(value);
  const int gpus = static_cast<int>(at::getNumGPUs());
  const std::string nccl = describe_nccl();
  if (communicator != "mpi" && ranks > gpus &&
      nccl.find("several ranks on one GPU") == std::string::npos) {
    return c10::str(ranks, " ranks on ", gpus, " GPUs need NCCL 2.30.3, this is: ", nccl);
  }
  return "";
}

uint64_t agree_on_seed(std::optional<uint64_t> requested) {
  const uint64_t own = requested.value_or(std::random_device{}());
  auto shared = torch::tensor({static_cast<int64_t>(own)}, torch::kInt64);
  session().harness->broadcast(shared, 0);
  return static_cast<uint64_t>(shared.item<int64_t>());
}

// Failures of a rank whose normal output is not shown.
class FailurePrinter : public ::testing::EmptyTestEventListener {
 public:
  void OnTestStart(const ::testing::TestInfo& info) override {
    test_ = std::string(info.test_suite_name()) + "." + info.name();
  }

  // GoogleTest calls this with a lock held that current_test_info() would take again.
  void OnTestPartResult(const ::testing::TestPartResult& result) override {
    if (!result.failed()) {
      return;
    }
    // In one piece, so that the ranks' reports do not mix.
    std::cerr << c10::str("[rank ", session().harness->rank(), "] ", test_, "\n  ",
                          result.file_name() ? result.file_name() : "?", ":", result.line_number(),
                          ": ", result.message(), "\n")
              << std::flush;
  }

 private:
  std::string test_;
};

// Between tests every rank learns whether any failed, so that all report the same outcome and start
// the next test with a communicator on which nothing is pending.
class Lockstep : public ::testing::EmptyTestEventListener {
 public:
  void OnTestStart(const ::testing::TestInfo&) override { torch::manual_seed(test_seed()); }

  void OnTestEnd(const ::testing::TestInfo& info) override {
    try {
      const bool failed_here = info.result()->Failed();
      auto failed = torch::tensor({failed_here ? 1 : 0}, torch::kInt64);
      session().harness->all_reduce(failed);
      const auto failed_ranks = failed.item<int64_t>();
      if (failed_ranks > 0) {
        session().groups.clear();
        session().world = make_world(session().communicator);
        if (!failed_here) {
          ADD_FAILURE() << "failed on " << failed_ranks << " other rank(s)";
        }
      }
    } catch (const std::exception& error) {
      ADD_FAILURE() << "the ranks lost each other: " << error.what();
      GTEST_FLAG_SET(fail_fast, true);
    }
  }
};

void install_listeners(int rank) {
  auto& listeners = ::testing::UnitTest::GetInstance()->listeners();
  if (rank != 0) {
    delete listeners.Release(listeners.default_result_printer());
    delete listeners.Release(listeners.default_xml_generator());
    listeners.Append(new FailurePrinter);
  }
  listeners.Append(new Lockstep);  // last in, so first at the end of a test: before it is printed
}

// Uninitialised memory reads as NaN (integers: their largest value) in every tensor the tests and
// the library allocate: an element that nobody wrote cannot pass for a zero. A tool that looks for
// uninitialised memory itself wants none of it: ANABRANCH_TEST_POISON=0.
void poison_uninitialised_memory() {
  const char* wanted = std::getenv("ANABRANCH_TEST_POISON");
  if (wanted != nullptr && std::string(wanted) == "0") {
    return;
  }
  at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/true);
  at::globalContext().setDeterministicFillUninitializedMemory(true);
}

int run(const Arguments& arguments) {
  // MPI_Init keeps a little of the plugins that it tries and unloads.
  if (__lsan_disable) __lsan_disable();
  session().harness = make_host_world(kHarnessDeadline);
  if (__lsan_enable) __lsan_enable();
  session().communicator = arguments.communicator;
  session().world = make_world(arguments.communicator);
  session().seed = agree_on_seed(arguments.seed);
  const auto& harness = *session().harness;
  if (harness.size() > 1) {
    at::set_num_threads(1);
  }
  poison_uninitialised_memory();
  GTEST_FLAG_SET(random_seed, static_cast<int>(session().seed % 99999 + 1));
  install_listeners(harness.rank());
  if (harness.rank() == 0) {
    std::cout << "ranks " << harness.size() << " (" << world()->name() << "), " << device()
              << ", seed " << session().seed << " (again with --seed=" << session().seed << ")"
              << std::endl;
  }
  const int status = RUN_ALL_TESTS();
  session().groups.clear();
  session().world.reset();
  session().harness.reset();
  // Here, and not at exit: by then OpenMPI has unloaded all its plugins, and what they still hold
  // belongs to nobody that a suppression could name.
  const bool leaks = __lsan_do_recoverable_leak_check && __lsan_do_recoverable_leak_check() != 0;
  return leaks ? EXIT_FAILURE : status;
}

}  // namespace

std::shared_ptr<Communicator> world() { return session().world; }

const ParallelGroups& parallel_groups(int64_t expert_parallel_size) {
  const auto known = session().groups.find(expert_parallel_size);
  if (known != session().groups.end()) {
    return known->second;
  }
  auto made = make_parallel_groups(world(), expert_parallel_size);
  return session().groups.emplace(expert_parallel_size, std::move(made)).first->second;
}

uint64_t seed() { return session().seed; }

uint64_t test_seed() {
  const auto* info = ::testing::UnitTest::GetInstance()->current_test_info();
  const std::string name =
      info ? std::string(info->test_suite_name()) + "." + info->name() : std::string();
  return std::hash<std::string>{}(std::to_string(seed()) + "/" + name);
}

int64_t effort(int64_t count) {
  const char* factor = std::getenv("ANABRANCH_TEST_EFFORT");
  const double scaled = static_cast<double>(count) * (factor ? std::stod(factor) : 1.0);
  return std::max<int64_t>(1, static_cast<int64_t>(scaled));
}

}  // namespace anabranch::test

int main(int argc, char** argv) {
  try {
    const auto arguments = anabranch::test::parse(argc, argv);
    if (!arguments.device.empty()) {
      anabranch::test::set_device(arguments.device);  // before GoogleTest asks for devices
    }
    ::testing::InitGoogleTest(&argc, argv);
    if (GTEST_FLAG_GET(list_tests)) {
      return RUN_ALL_TESTS();
    }
    const std::string obstacle = anabranch::test::obstacle(arguments.communicator);
    if (!obstacle.empty()) {
      std::cout << "no test was run: " << obstacle << std::endl;
      return 0;
    }
    return anabranch::test::run(arguments);
  } catch (const std::exception& error) {
    std::cerr << "cannot run the tests: " << error.what() << std::endl;
    return 2;
  }
}
