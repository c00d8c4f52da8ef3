#pragma once

#include <anabranch/rank_discovery.h>

#include <string>
#include <vector>

namespace anabranch {

/// A number, and the variable that holds it.
struct Field {
  std::string variable;
  int value = 0;
};

/// What one launcher says about this process.
struct Statement {
  std::string launcher;
  /// Has one agent on each node, whom another launcher may have started.
  bool has_agents = false;
  std::optional<Field> rank;
  std::optional<Field> size;
  std::optional<Field> local_rank;
  std::optional<Field> local_size;
};

/// The statements of all launchers that have left variables, innermost first: who could have been
/// started by another comes before it. Throws InputError for a variable that holds no number.
std::vector<Statement> read_statements(const Environment& environment);

}  // namespace anabranch
