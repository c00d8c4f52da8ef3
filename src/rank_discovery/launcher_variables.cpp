#include "rank_discovery/launcher_variables.h"

#include <anabranch/error.h>

#include <charconv>
#include <regex>

namespace anabranch {
namespace {

constexpr const char* kPmix = "PMIx";

int to_number(const std::string& variable, const std::string& text) {
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 0) {
    throw InputError("rank discovery: " + variable + " is '" + text +
                     "', expected a number of at least 0");
  }
  return value;
}

bool has(const Environment& environment, const std::string& variable) {
  const auto found = environment.find(variable);
  return found != environment.end() && !found->second.empty();
}

/// The first of `variables` that is set, to something.
std::optional<Field> read(const Environment& environment,
                          const std::vector<std::string>& variables) {
  for (const auto& variable : variables) {
    if (has(environment, variable)) {
      return Field{variable, to_number(variable, environment.at(variable))};
    }
  }
  return std::nullopt;
}

Statement torchrun(const Environment& environment) {
  const bool agent = has(environment, "TORCHELASTIC_RUN_ID");
  return {agent ? "torchrun" : "RANK and WORLD_SIZE",
          agent,
          read(environment, {"RANK"}),
          read(environment, {"WORLD_SIZE"}),
          read(environment, {"LOCAL_RANK"}),
          read(environment, {"LOCAL_WORLD_SIZE"})};
}

Statement open_mpi(const Environment& environment) {
  return {"Open MPI",
          true,
          read(environment, {"OMPI_COMM_WORLD_RANK"}),
          read(environment, {"OMPI_COMM_WORLD_SIZE"}),
          read(environment, {"OMPI_COMM_WORLD_LOCAL_RANK"}),
          read(environment, {"OMPI_COMM_WORLD_LOCAL_SIZE"})};
}

/// MPICH and Intel MPI (Hydra), Cray's PALS, and Slurm with --mpi=pmi2.
Statement pmi(const Environment& environment) {
  return {"PMI",
          has(environment, "MPI_LOCALNRANKS"),
          read(environment, {"PMI_RANK"}),
          read(environment, {"PMI_SIZE"}),
          read(environment, {"MPI_LOCALRANKID", "PMI_LOCAL_RANK"}),
          read(environment, {"MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"})};
}

/// Its other numbers are asked from a server; Slurm or mpirun say them beside it. An MPI that nobody
/// launched leaves it too, in its own process.
Statement pmix(const Environment& environment) {
  Statement statement;
  statement.launcher = kPmix;
  statement.rank = read(environment, {"PMIX_RANK"});
  return statement;
}

/// Tasks of node `node` in Slurm's words for all nodes: "2(x3),1" is 2, 2, 2, 1.
std::optional<int> tasks_on_node(const std::string& words, int node) {
  static const std::regex kGroup(R"((\d+)(?:\(x(\d+)\))?(?:,|$))");
  for (std::sregex_iterator group(words.begin(), words.end(), kGroup), end; group != end; ++group) {
    const int nodes = (*group)[2].matched ? to_number("SLURM_STEP_TASKS_PER_NODE", (*group)[2]) : 1;
    if (node < nodes) {
      return to_number("SLURM_STEP_TASKS_PER_NODE", (*group)[1]);
    }
    node -= nodes;
  }
  return std::nullopt;
}

/// A process of a job step, that srun has started. A batch script has a rank of 0 as well, and what it
/// starts without srun inherits that: such a process is none of Slurm's tasks.
Statement slurm(const Environment& environment) {
  Statement statement;
  statement.launcher = "Slurm";
  if (!has(environment, "SLURM_STEP_ID")) {
    return statement;
  }
  statement.rank = read(environment, {"SLURM_PROCID"});
  statement.size = read(environment, {"SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"});
  statement.local_rank = read(environment, {"SLURM_LOCALID"});
  const auto node = read(environment, {"SLURM_NODEID"});
  const std::string tasks = "SLURM_STEP_TASKS_PER_NODE";
  if (node && has(environment, tasks)) {
    if (const auto count = tasks_on_node(environment.at(tasks), node->value)) {
      statement.local_size = Field{tasks, *count};
    }
  }
  return statement;
}

}  // namespace

std::vector<Statement> read_statements(const Environment& environment) {
  std::vector<Statement> statements;
  for (const auto& read_one : {torchrun, open_mpi, pmi, pmix, slurm}) {
    Statement statement = read_one(environment);
    // Sizes alone are often set by hand, for others.
    if (statement.rank) {
      statements.push_back(std::move(statement));
    }
  }
  if (statements.size() == 1 && statements.front().launcher == kPmix) {
    statements.clear();
  }
  return statements;
}

}  // namespace anabranch
