#include "communicator/host.h"

#include <c10/util/StringUtil.h>
#include <sys/stat.h>
#include <unistd.h>

#include <fstream>
#include <stdexcept>

namespace anabranch {

std::string host_identity() {
  char name[256] = {};
  if (gethostname(name, sizeof(name) - 1) != 0) {
    throw std::runtime_error("gethostname failed");
  }
  std::string boot;
  std::ifstream("/proc/sys/kernel/random/boot_id") >> boot;
  return c10::str(name, '/', boot);
}

std::string network_identity() {
  struct stat space = {};
  static_cast<void>(stat("/proc/thread-self/ns/net", &space));  // 0 where there are no such spaces
  return c10::str(host_identity(), '/', space.st_ino);
}

}  // namespace anabranch
