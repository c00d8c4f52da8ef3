#include "support/shared_directory.h"

#include <stdlib.h>

#include <iostream>
#include <stdexcept>
#include <string>

#include "communicator/agreement.h"
#include "support/world.h"

namespace anabranch::test {

SharedDirectory::SharedDirectory() {
  std::string name;
  if (world()->rank() == 0) {
    name = (std::filesystem::temp_directory_path() / "anabranch-test-XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) throw std::runtime_error("cannot make " + name);
  }
  path_ = all_gather_strings(*world(), name)[0];
}

// Nobody removes what another rank still reads.
SharedDirectory::~SharedDirectory() {
  try {
    world()->barrier();
  } catch (const std::exception& error) {
    std::cerr << error.what() << std::endl;
  }
  std::error_code ignored;
  if (world()->rank() == 0) std::filesystem::remove_all(path_, ignored);
}

}  // namespace anabranch::test
