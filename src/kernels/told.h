#pragma once

#include <cstdint>

namespace anabranch {

/// What every rank tells all others of a step whose counts stay on the device, int64, in this order; behind it
/// its rows for each rank [W] and its assignments of each expert [E].
enum Told : int64_t {
  kToldNonfinite,        ///< first token whose gate is not finite, or −1
  kToldInvalid,          ///< first token whose ids are invalid, or −1
  kToldForm,             ///< how it takes part in the step: a number that all ranks have alike
  kToldRoomRows,         ///< rows that it has room for
  kToldRoomAssignments,  ///< assignments that it has room for
  kTold,
};

}  // namespace anabranch
