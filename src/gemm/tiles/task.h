#pragma once

namespace anabranch::tiles {

/// c = a · b. Forward: rows · weightᵀ. Dgrad: rows · weight. Wgrad: rowsᵀ · rows, a weight.
enum class Operation { kForward, kDgrad, kWgrad };

/// What becomes of the products. kStore: c. kAccumulate (wgrad): added to fp32 sums. kActivate
/// (forward): they are the hidden rows, which are stored with their activation. kActivateBackward
/// (dgrad): they are the gradient at the activation, and the gradient of the hidden rows is stored with
/// the activation, both scaled by the routing weights.
enum class Epilogue { kStore, kActivate, kActivateBackward, kAccumulate };

/// Which operand's rows are read by an index: of forward and dgrad a, of wgrad one or the other.
enum class Gathered { kNone, kA, kB };

enum class Element { kBfloat16, kHalf };

/// What to do, and of which type.
struct Task {
  Operation operation;
  Element element;
  Epilogue epilogue = Epilogue::kStore;
  bool glu = false;  ///< of the epilogue
  Gathered gathered = Gathered::kNone;
};

}  // namespace anabranch::tiles
