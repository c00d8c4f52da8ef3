#pragma once

#include <cstdint>

namespace anabranch::benchmark {

/// A layer and a step's tokens.
struct Shape {
  const char* name;
  int64_t tokens;
  int64_t hidden;
  int64_t inner;
  int64_t experts;
  int64_t top_k;
  bool glu;
  double skew = 0;  ///< s of Zipf's law for the experts' popularity

  Shape with_skew(double s) const {
    Shape shape = *this;
    shape.skew = s;
    return shape;
  }
  Shape with_tokens(int64_t count) const {
    Shape shape = *this;
    shape.tokens = count;
    return shape;
  }
  /// Exact, forward and backward.
  double flops() const {
    return 3.0 * 2.0 * static_cast<double>(tokens * top_k * hidden * inner) * (glu ? 3 : 2);
  }
};

}  // namespace anabranch::benchmark
