#pragma once

#include <c10/util/StringUtil.h>

#include <stdexcept>

namespace train_lm {

/// Throws std::invalid_argument with the parts of the message unless `condition`.
template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) {
    throw std::invalid_argument(c10::str(parts...));
  }
}

}  // namespace train_lm
