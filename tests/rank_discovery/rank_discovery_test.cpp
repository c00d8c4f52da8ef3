#include <anabranch/communicator.h>
#include <anabranch/error.h>
#include <anabranch/rank_discovery.h>
#include <gtest/gtest.h>

#include <cstdlib>

#include "support/thrown.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

RankInfo discover(const Environment& environment) { return discover_rank(environment, "a-host"); }

void expect(const Environment& environment, const std::string& launcher, int rank, int size,
            std::optional<int> local_rank, std::optional<int> local_size) {
  const RankInfo info = discover(environment);
  EXPECT_EQ(info.launcher, launcher);
  EXPECT_EQ(info.rank, rank);
  EXPECT_EQ(info.size, size);
  EXPECT_EQ(info.local_rank, local_rank);
  EXPECT_EQ(info.local_size, local_size);
  EXPECT_EQ(info.node, "a-host");
}

/// Both; names given twice are `more`'s.
Environment with(Environment environment, const Environment& more) {
  for (const auto& [name, value] : more) {
    environment[name] = value;
  }
  return environment;
}

// As those launchers set them (Open MPI 4.1.4, Slurm 22.05, MPICH's Hydra, torchrun 2.11).
const Environment kTorchrun = {{"RANK", "5"},
                               {"WORLD_SIZE", "8"},
                               {"LOCAL_RANK", "1"},
                               {"LOCAL_WORLD_SIZE", "4"},
                               {"GROUP_RANK", "1"},
                               {"GROUP_WORLD_SIZE", "2"},
                               {"MASTER_ADDR", "node0"},
                               {"TORCHELASTIC_RUN_ID", "none"}};
const Environment kOpenMpi = {
    {"OMPI_COMM_WORLD_RANK", "3"},       {"OMPI_COMM_WORLD_SIZE", "4"},
    {"OMPI_COMM_WORLD_LOCAL_RANK", "1"}, {"OMPI_COMM_WORLD_LOCAL_SIZE", "2"},
    {"OMPI_COMM_WORLD_NODE_RANK", "1"},  {"PMIX_RANK", "3"},
    {"PMIX_NAMESPACE", "433389569"}};
const Environment kHydra = {
    {"PMI_RANK", "6"}, {"PMI_SIZE", "7"}, {"MPI_LOCALRANKID", "2"}, {"MPI_LOCALNRANKS", "3"}};
// srun -N 2 -n 4 with three tasks on the first node.
const Environment kSlurmStep = {{"SLURM_JOB_ID", "9"}, {"SLURM_STEP_ID", "0"},
                                {"SLURM_PROCID", "2"}, {"SLURM_STEP_NUM_TASKS", "4"},
                                {"SLURM_NTASKS", "4"}, {"SLURM_LOCALID", "2"},
                                {"SLURM_NODEID", "0"}, {"SLURM_STEP_TASKS_PER_NODE", "3,1"}};
const Environment kSlurmBatch = {{"SLURM_JOB_ID", "9"}, {"SLURM_PROCID", "0"},
                                 {"SLURM_NTASKS", "4"}, {"SLURM_LOCALID", "0"},
                                 {"SLURM_NODEID", "0"}, {"SLURM_TASKS_PER_NODE", "2(x2)"}};
// One task on each of two nodes: srun started mpirun's or torchrun's agents.
const Environment kSlurmAgents = {{"SLURM_JOB_ID", "9"},
                                  {"SLURM_STEP_ID", "1"},
                                  {"SLURM_PROCID", "0"},
                                  {"SLURM_STEP_NUM_TASKS", "2"},
                                  {"SLURM_LOCALID", "0"},
                                  {"SLURM_NODEID", "0"},
                                  {"SLURM_STEP_TASKS_PER_NODE", "1(x2)"}};

TEST(RankDiscovery, NothingAtAll) { expect({}, "", 0, 1, 0, 1); }

TEST(RankDiscovery, Torchrun) { expect(kTorchrun, "torchrun", 5, 8, 1, 4); }

TEST(RankDiscovery, OpenMpi) { expect(kOpenMpi, "Open MPI", 3, 4, 1, 2); }

TEST(RankDiscovery, Pmi) {
  expect(kHydra, "PMI", 6, 7, 2, 3);
  expect({{"PMI_RANK", "1"}, {"PMI_SIZE", "2"}}, "PMI", 1, 2, std::nullopt, std::nullopt);
  expect({{"PMI_RANK", "1"}, {"PMI_SIZE", "2"}, {"PMI_LOCAL_RANK", "0"}, {"PMI_LOCAL_SIZE", "1"}},
         "PMI", 1, 2, 0, 1);
}

TEST(RankDiscovery, Slurm) { expect(kSlurmStep, "Slurm", 2, 4, 2, 3); }

TEST(RankDiscovery, PmixAndPmiOfSlurm) {
  expect(with(kSlurmStep, {{"PMIX_RANK", "2"}}), "PMIx", 2, 4, 2, 3);
  expect(with(kSlurmStep, {{"PMI_RANK", "2"}, {"PMI_SIZE", "4"}}), "PMI", 2, 4, 2, 3);
}

TEST(RankDiscovery, PmixAloneIsAnMpiThatNobodyLaunched) {
  expect({{"PMIX_RANK", "0"}, {"PMIX_NAMESPACE", "933298177"}}, "", 0, 1, 0, 1);
}

TEST(RankDiscovery, SlurmsTasksOfANode) {
  const auto local_size = [](const std::string& words, int node) {
    return discover(with(kSlurmStep, {{"SLURM_STEP_TASKS_PER_NODE", words},
                                      {"SLURM_NODEID", std::to_string(node)},
                                      {"SLURM_LOCALID", "0"},
                                      {"SLURM_PROCID", "0"},
                                      {"SLURM_STEP_NUM_TASKS", "100"}}))
        .local_size;
  };
  EXPECT_EQ(local_size("4", 0), 4);
  EXPECT_EQ(local_size("2(x3),1", 0), 2);
  EXPECT_EQ(local_size("2(x3),1", 2), 2);
  EXPECT_EQ(local_size("2(x3),1", 3), 1);
  EXPECT_EQ(local_size("1,12(x10),3(x2)", 12), 3);
  EXPECT_EQ(local_size("2(x3),1", 4), std::nullopt);
}

TEST(RankDiscovery, ABatchScriptIsNoRank) {
  expect(kSlurmBatch, "", 0, 1, 0, 1);
  expect(with(kSlurmBatch, kOpenMpi), "Open MPI", 3, 4, 1, 2);
}

TEST(RankDiscovery, SlurmStartsTheAgentsOfOthers) {
  expect(with(kSlurmAgents, kOpenMpi), "Open MPI", 3, 4, 1, 2);
  expect(with(kSlurmAgents, kTorchrun), "torchrun", 5, 8, 1, 4);
  expect(with(with(kSlurmAgents, {{"PMIX_RANK", "0"}}), kTorchrun), "torchrun", 5, 8, 1, 4);
}

TEST(RankDiscovery, MpirunStartsTorchrun) {
  const Environment one_a_node = with(kOpenMpi, {{"OMPI_COMM_WORLD_RANK", "1"},
                                                 {"OMPI_COMM_WORLD_SIZE", "2"},
                                                 {"OMPI_COMM_WORLD_LOCAL_RANK", "0"},
                                                 {"OMPI_COMM_WORLD_LOCAL_SIZE", "1"},
                                                 {"PMIX_RANK", "1"}});
  expect(with(one_a_node, kTorchrun), "torchrun", 5, 8, 1, 4);
}

TEST(RankDiscovery, SizesSetForOthersDoNotCount) {
  expect({{"WORLD_SIZE", "16"}, {"MASTER_ADDR", "node0"}}, "", 0, 1, 0, 1);
  expect(with(kOpenMpi, {{"WORLD_SIZE", "16"}}), "Open MPI", 3, 4, 1, 2);
  expect({{"RANK", ""}, {"WORLD_SIZE", ""}}, "", 0, 1, 0, 1);
}

TEST(RankDiscovery, RankAndWorldSizeByHandHaveToAgree) {
  const Environment right = {{"RANK", "3"}, {"WORLD_SIZE", "4"}};
  expect(right, "RANK and WORLD_SIZE", 3, 4, std::nullopt, std::nullopt);
  expect(with(kOpenMpi, right), "RANK and WORLD_SIZE", 3, 4, 1, 2);
  // What `export RANK=$SLURM_PROCID` in a batch script leaves on every rank.
  const Environment wrong = {{"RANK", "0"}, {"WORLD_SIZE", "4"}};
  EXPECT_INPUT_ERROR(discover(with(kOpenMpi, wrong)),
                     "this process's rank: RANK=0 (RANK and WORLD_SIZE) but "
                     "OMPI_COMM_WORLD_RANK=3 (Open MPI)");
  EXPECT_INPUT_ERROR(discover(with(kSlurmStep, wrong)), "SLURM_PROCID=2 (Slurm)");
  EXPECT_INPUT_ERROR(discover(with(kSlurmStep, {{"RANK", "2"}, {"WORLD_SIZE", "5"}})),
                     "number of ranks: WORLD_SIZE=5");
}

TEST(RankDiscovery, SeveralMpirunsOnOneNodeDisagreeWithSlurm) {
  EXPECT_INPUT_ERROR(discover(with(kSlurmStep, kOpenMpi)),
                     "OMPI_COMM_WORLD_RANK=3 (Open MPI) but SLURM_PROCID=2 (Slurm)");
}

TEST(RankDiscovery, WhatIsNoRankIsRefused) {
  for (const std::string text : {"one", "-1", "1x", "0x1", " 1", "99999999999"}) {
    EXPECT_INPUT_ERROR(discover(with(kOpenMpi, {{"OMPI_COMM_WORLD_RANK", text}})),
                       "OMPI_COMM_WORLD_RANK is '" + text + "'");
  }
  EXPECT_INPUT_ERROR(discover(with(kHydra, {{"PMI_RANK", "7"}})),
                     "PMI_RANK is 7, expected less than PMI_SIZE, 7");
  EXPECT_INPUT_ERROR(discover(with(kHydra, {{"MPI_LOCALRANKID", "3"}})),
                     "MPI_LOCALRANKID is 3, expected less than MPI_LOCALNRANKS, 3");
  EXPECT_INPUT_ERROR(discover({{"RANK", "1"}}), "nothing says how many ranks there are");
}

TEST(RankDiscovery, FindsTheRanksOfThisJob) {
  const RankInfo info = discover_rank();
  EXPECT_EQ(info.rank, world()->rank());
  EXPECT_EQ(info.size, world()->size());
  EXPECT_FALSE(info.node.empty());
}

/// Sets a variable until the end of a block.
class Variable {
 public:
  Variable(const char* name, const std::string& value) : name_(name) {
    if (const char* found = std::getenv(name)) {
      before_ = found;
    }
    setenv(name, value.c_str(), 1);
  }
  ~Variable() {
    if (before_) {
      setenv(name_, before_->c_str(), 1);
    } else {
      unsetenv(name_);
    }
  }
  Variable(const Variable&) = delete;
  Variable& operator=(const Variable&) = delete;

 private:
  const char* name_;
  std::optional<std::string> before_;
};

TEST(RankDiscovery, MpiHasToKnowTheSameRanks) {
  if (std::getenv("OMPI_COMM_WORLD_SIZE") == nullptr) {
    GTEST_SKIP() << "needs Open MPI's mpirun";
  }
  // As srun without --mpi=pmix: the launcher has started more ranks than MPI knows.
  const std::string more = std::to_string(world()->size() + 1);
  const Variable size("OMPI_COMM_WORLD_SIZE", more);
  const auto thrown = thrown_by([] { make_mpi_communicator(); });
  EXPECT_EQ(thrown.kind, Thrown::Kind::kInput) << thrown;
  EXPECT_TRUE(thrown.says("of " + more)) << thrown;
}

TEST(RankDiscovery, AnErrorOnOneRankIsEveryRanks) {
  ANABRANCH_NEEDS_RANKS(2);
  const Variable size("WORLD_SIZE", std::to_string(world()->size()));
  const Variable rank("RANK", "0");  // right on rank 0 alone
  const auto thrown = thrown_by([] { make_mpi_communicator(); });
  if (world()->rank() == 0) {
    EXPECT_EQ(thrown.kind, Thrown::Kind::kCommunication) << thrown;
    EXPECT_TRUE(thrown.says("RANK=0")) << thrown;
    ASSERT_FALSE(thrown.peers.empty());
    EXPECT_EQ(thrown.peers.front(), 1);
  } else {
    EXPECT_EQ(thrown.kind, Thrown::Kind::kInput) << thrown;
  }
}

}  // namespace
}  // namespace anabranch::test
