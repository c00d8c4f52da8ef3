#include "support/capture.h"

namespace anabranch {

bool is_captured(c10::Device /*device*/) { return false; }

}  // namespace anabranch
