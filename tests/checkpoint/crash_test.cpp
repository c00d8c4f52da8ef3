// Saves that never came to their end: the former checkpoint stands.
#include <anabranch/checkpoint.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <thread>

#include "checkpoint/checkpoint_case.h"
#include "checkpoint/save.h"
#include "support/random.h"
#include "support/shared_directory.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

namespace fs = std::filesystem;

constexpr const char* kDirectoryVariable = "ANABRANCH_TEST_CRASH_DIRECTORY";

void expect_loads(const fs::path& directory, const ParallelGroups& groups,
                  const Training& expected) {
  auto training = make_training({}, *groups.expert_parallel, 99);
  load_checkpoint(directory, *training.model, training.optimizer.get(), groups);
  expect_part_of(training, expected);
}

TEST(CheckpointCrash, BetweenFilesAndIndexTheFormerOneStands) {
  const SharedDirectory directory;
  const auto groups = parallel_groups();
  const auto self = make_self_communicator();
  auto training = make_training({}, *groups.expert_parallel, 1);
  auto whole = make_training({}, *self, 1);
  train(training, 2, 1);
  train(whole, 2, 1);
  save_checkpoint(directory.path(), *training.model, training.optimizer.get(), {}, groups);
  const auto sound = files_in(directory.path());

  // All files of a second save are there, and it ends here.
  auto later = make_training({}, *groups.expert_parallel, 1);
  train(later, 5, 3);
  write_files(directory.path(), "0123456789abcdef", *later.model, later.optimizer.get(), {},
              groups);
  EXPECT_GT(files_in(directory.path()).size(), sound.size());
  expect_loads(directory.path(), groups, whole);

  // The next one clears up.
  save_checkpoint(directory.path(), *training.model, training.optimizer.get(), {}, groups);
  EXPECT_EQ(files_in(directory.path()).size(), sound.size());
  expect_loads(directory.path(), groups, whole);
}

/// All numbers of the model are `value`.
std::shared_ptr<ShardedModel> constant_model(double value) {
  auto model = make_sharded_model({}, *make_self_communicator(), 1);
  const torch::NoGradGuard no_grad;
  for (const auto& parameter : model->parameters()) parameter.fill_(value);
  return model;
}

// Runs in a process of its own, until it is killed.
TEST(CheckpointCrash, DISABLED_SavesForever) {
  const char* directory = std::getenv(kDirectoryVariable);
  ASSERT_NE(directory, nullptr);
  const auto groups = make_parallel_groups(make_self_communicator());
  for (int64_t save = 1;; ++save) {
    save_checkpoint(directory, *constant_model(static_cast<double>(save)), nullptr,
                    {{"save", std::to_string(save)}}, groups);
  }
}

/// Starts this program again, on one rank and without MPI, to run that test.
pid_t start_saving(const fs::path& directory) {
  std::vector<std::string> variables{c10::str(kDirectoryVariable, "=", directory.string())};
  for (char** variable = environ; *variable != nullptr; ++variable) {
    const std::string text = *variable;
    if (text.starts_with("OMPI_") || text.starts_with("PMI")) continue;
    variables.push_back(text);
  }
  std::vector<std::string> arguments{"crash",
                                     "--gtest_filter=CheckpointCrash.DISABLED_SavesForever",
                                     "--gtest_also_run_disabled_tests", "--gtest_output="};
  const auto pointers = [](std::vector<std::string>& texts) {
    std::vector<char*> result;
    for (auto& text : texts) result.push_back(text.data());
    result.push_back(nullptr);
    return result;
  };
  posix_spawn_file_actions_t quietly;
  posix_spawn_file_actions_init(&quietly);
  posix_spawn_file_actions_addopen(&quietly, STDOUT_FILENO, "/dev/null", O_WRONLY, 0);
  pid_t child = 0;
  const int error = posix_spawn(&child, "/proc/self/exe", &quietly, nullptr,
                                pointers(arguments).data(), pointers(variables).data());
  posix_spawn_file_actions_destroy(&quietly);
  if (error != 0) throw std::runtime_error("posix_spawn failed");
  return child;
}

void kill_and_wait(pid_t child) {
  ASSERT_EQ(kill(child, SIGKILL), 0);
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFSIGNALED(status)) << "the saving process ended on its own, status " << status;
}

void wait_for_first_save(const fs::path& directory) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::minutes(1);
  while (!fs::exists(directory / kIndexName)) {
    ASSERT_LT(std::chrono::steady_clock::now(), deadline) << "nothing was saved";
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
}

TEST(CheckpointCrash, KilledAtAnyMomentLeavesOneCheckpointWhole) {
  if (world()->size() > 1) GTEST_SKIP() << "needs a single rank";
  Random random(test_seed());
  const auto groups = parallel_groups();
  for (int64_t kill_number = effort(8); kill_number > 0; --kill_number) {
    const SharedDirectory directory;
    const auto child = start_saving(directory.path());
    wait_for_first_save(directory.path());
    std::this_thread::sleep_for(std::chrono::microseconds(random.integer(0, 60000)));
    kill_and_wait(child);
    auto model = make_sharded_model({}, *groups.expert_parallel, 1);
    const auto metadata = load_checkpoint(directory.path(), *model, nullptr, groups);
    const double value = std::stod(metadata.at("save"));
    for (const auto& parameter : model->parameters()) {
      EXPECT_TRUE((parameter == value).all().item<bool>()) << "after save " << value;
    }
  }
}

}  // namespace
}  // namespace anabranch::test
