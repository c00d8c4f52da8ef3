#include <anabranch/error.h>
#include <anabranch/rank_discovery.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <climits>
#include <system_error>
#include <utility>

#include "rank_discovery/launcher_variables.h"

namespace anabranch {
namespace {

using Member = std::optional<Field> Statement::*;

constexpr std::array<std::pair<const char*, Member>, 4> kMembers = {{
    {"rank", &Statement::rank},
    {"number of ranks", &Statement::size},
    {"rank on its node", &Statement::local_rank},
    {"number of ranks on its node", &Statement::local_size},
}};

/// Who does not count the ranks of a node lets the one around it do so: PMI and PMIx by Slurm or
/// Open MPI.
void complete_local_sizes(std::vector<Statement>& statements) {
  for (auto& statement : statements) {
    for (const auto& other : statements) {
      const bool counts = other.launcher == "Slurm" || other.launcher == "Open MPI";
      if (!statement.local_size && counts && other.rank->value == statement.rank->value) {
        statement.local_size = other.local_size;
      }
    }
  }
}

/// Leaves out the launchers that have only started the agent of an inner one.
std::vector<Statement> of_this_process(const std::vector<Statement>& statements) {
  std::vector<Statement> kept;
  bool inner_agent = false;
  for (const auto& statement : statements) {
    const bool one_a_node = statement.local_size && statement.local_size->value == 1;
    if (!(inner_agent && one_a_node)) {
      kept.push_back(statement);
    }
    inner_agent = inner_agent || statement.has_agents;
  }
  return kept;
}

/// The first statement's numbers, with those it lacks from the others. They must not contradict.
Statement merge(const std::vector<Statement>& statements) {
  Statement merged = statements.front();
  for (const auto& other : statements) {
    for (const auto& [what, member] : kMembers) {
      const auto& known = merged.*member;
      const auto& said = other.*member;
      if (known && said && known->value != said->value) {
        throw InputError(std::string("rank discovery: the launchers disagree on this process's ") +
                         what + ": " + known->variable + "=" + std::to_string(known->value) + " (" +
                         merged.launcher + ") but " + said->variable + "=" +
                         std::to_string(said->value) + " (" + other.launcher +
                         "); start the ranks by one of them, or unset the other's variables");
      }
      if (!known) {
        merged.*member = said;
      }
    }
  }
  return merged;
}

void check_range(const std::optional<Field>& number, const std::optional<Field>& count) {
  if (number && count && number->value >= count->value) {
    throw InputError("rank discovery: " + number->variable + " is " +
                     std::to_string(number->value) + ", expected less than " + count->variable +
                     ", " + std::to_string(count->value));
  }
}

std::optional<int> value_of(const std::optional<Field>& field) {
  return field ? std::optional(field->value) : std::nullopt;
}

}  // namespace

RankInfo discover_rank(const Environment& environment, std::string node) {
  RankInfo info;
  info.node = std::move(node);
  auto statements = read_statements(environment);
  if (statements.empty()) {
    info.local_rank = 0;
    info.local_size = 1;
    return info;
  }
  complete_local_sizes(statements);
  const Statement merged = merge(of_this_process(statements));
  if (!merged.size) {
    throw InputError("rank discovery: " + merged.rank->variable + " is " +
                     std::to_string(merged.rank->value) + " (" + merged.launcher +
                     "), but nothing says how many ranks there are");
  }
  check_range(merged.rank, merged.size);
  check_range(merged.local_rank, merged.local_size);
  info.rank = merged.rank->value;
  info.size = merged.size->value;
  info.local_rank = info.size == 1 ? 0 : value_of(merged.local_rank);
  info.local_size = info.size == 1 ? 1 : value_of(merged.local_size);
  info.launcher = merged.launcher;
  return info;
}

Environment process_environment() {
  Environment environment;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string text = *entry;
    const size_t equals = text.find('=');
    if (equals != std::string::npos) {
      environment.emplace(text.substr(0, equals), text.substr(equals + 1));
    }
  }
  return environment;
}

RankInfo discover_rank() {
  std::array<char, HOST_NAME_MAX + 1> name = {};
  if (gethostname(name.data(), name.size() - 1) != 0) {
    throw std::system_error(errno, std::generic_category(), "gethostname in discover_rank");
  }
  return discover_rank(process_environment(), name.data());
}

}  // namespace anabranch
