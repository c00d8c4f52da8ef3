#pragma once

#include <unistd.h>

#include <stdexcept>
#include <string>

namespace anabranch {

inline std::string host_name() {
  char name[256] = {};
  if (gethostname(name, sizeof(name) - 1) != 0) {
    throw std::runtime_error("gethostname failed");
  }
  return name;
}

/// What to call host `name` by from the host `own`: a host's name need not lead to itself in a
/// container, the loop device does.
inline std::string reachable_name(const std::string& name, const std::string& own) {
  return name == own ? "127.0.0.1" : name;
}

}  // namespace anabranch
