// main of every test program: the same tests run on each rank, in lockstep.
#include "support/world.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <c10/util/StringUtil.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <iostream>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>

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

std::shared_ptr<Communicator> make_world(std::chrono::milliseconds deadline) {
  if (!started_by_a_launcher()) {
    return make_self_communicator();
  }
  CommunicatorOptions options;
  options.deadline = deadline;
  return make_mpi_communicator(options);
}

std::optional<uint64_t> requested_seed(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument.rfind("--seed=", 0) == 0) {
      return std::stoull(argument.substr(7));
    }
    if (argument == "--seed" && i + 1 < argc) {
      return std::stoull(argv[i + 1]);
    }
    throw std::invalid_argument("unknown argument '" + argument + "'; known: --seed N, --gtest_*");
  }
  if (const char* value = std::getenv("ANABRANCH_TEST_SEED")) {
    return std::stoull(value);
  }
  return std::nullopt;
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
        session().world = make_world(kTestDeadline);
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
// the library allocate: an element that nobody wrote cannot pass for a zero.
void poison_uninitialised_memory() {
  at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/true);
  at::globalContext().setDeterministicFillUninitializedMemory(true);
}

int run(int argc, char** argv) {
  // MPI_Init keeps a little of the plugins that it tries and unloads.
  if (__lsan_disable) __lsan_disable();
  session().harness = make_world(kHarnessDeadline);
  if (__lsan_enable) __lsan_enable();
  session().world = make_world(kTestDeadline);
  session().seed = agree_on_seed(requested_seed(argc, argv));
  const auto& harness = *session().harness;
  if (harness.size() > 1) {
    at::set_num_threads(1);
  }
  poison_uninitialised_memory();
  GTEST_FLAG_SET(random_seed, static_cast<int>(session().seed % 99999 + 1));
  install_listeners(harness.rank());
  if (harness.rank() == 0) {
    std::cout << "ranks " << harness.size() << " (" << harness.name() << "), seed "
              << session().seed << " (again with --seed=" << session().seed << ")" << std::endl;
  }
  const int status = RUN_ALL_TESTS();
  session().world.reset();
  session().harness.reset();
  // Here, and not at exit: by then OpenMPI has unloaded all its plugins, and what they still hold
  // belongs to nobody that a suppression could name.
  const bool leaks = __lsan_do_recoverable_leak_check && __lsan_do_recoverable_leak_check() != 0;
  return leaks ? EXIT_FAILURE : status;
}

}  // namespace

std::shared_ptr<Communicator> world() { return session().world; }

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
  ::testing::InitGoogleTest(&argc, argv);
  if (GTEST_FLAG_GET(list_tests)) {
    return RUN_ALL_TESTS();
  }
  try {
    return anabranch::test::run(argc, argv);
  } catch (const std::exception& error) {
    std::cerr << "cannot run the tests: " << error.what() << std::endl;
    return 2;
  }
}
