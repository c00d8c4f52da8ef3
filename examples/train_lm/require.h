#pragma once

#include <c10/util/StringUtil.h>

#include <cmath>
#include <cstdint>
#include <stdexcept>

namespace train_lm {

/// Throws std::invalid_argument with the parts of the message unless `condition`.
template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) {
    throw std::invalid_argument(c10::str(parts...));
  }
}

// The same, of an option's value.

inline void at_least(const char* name, int64_t value, int64_t minimum) {
  require(value >= minimum, name, " must be at least ", minimum, ", got ", value);
}

inline void not_negative(const char* name, double value) {
  require(std::isfinite(value) && value >= 0, name, " must be finite and not negative, got ",
          value);
}

inline void positive(const char* name, double value) {
  require(std::isfinite(value) && value > 0, name, " must be finite and positive, got ", value);
}

}  // namespace train_lm
