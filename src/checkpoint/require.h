#pragma once

#include <anabranch/error.h>
#include <c10/util/StringUtil.h>

namespace anabranch {

/// A CheckpointError of `parts` unless `condition`.
void require(bool condition, const auto&... parts) {
  if (!condition) throw CheckpointError(c10::str(parts...));
}

}  // namespace anabranch
