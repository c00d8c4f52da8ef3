#pragma once

#include <anabranch/error.h>
#include <c10/util/StringUtil.h>

namespace anabranch {

/// Throws InputError with the parts of the message, streamed one after another, unless `condition`.
template <typename... Parts>
void check_input(bool condition, const Parts&... parts) {
  if (!condition) [[unlikely]] {
    throw InputError(c10::str(parts...));
  }
}

}  // namespace anabranch
