#pragma once

#include <algorithm>
#include <cstdint>

// What a mailbox holds: see rows.h.

namespace anabranch::peer {

constexpr int kMaxRanks = 8;
/// Slots of a queue, and their size.
constexpr int kSlots = 2;
constexpr int64_t kSlotBytes = 256 << 10;

/// Of the queues between the mailbox's owner and one other rank on one lane. The first two are
/// written by that other rank, on its own GPU, the last two by the owner. They only grow.
struct alignas(128) Queues {
  uint64_t filled;    ///< slots of the mailbox that the other has filled
  uint64_t emptied;   ///< slots of the other's mailbox, filled by the owner, that it has emptied
  uint64_t sent;      ///< slots that the owner has filled
  uint64_t received;  ///< slots that the owner has emptied
};

/// Where things are in a mailbox of `size` ranks: the slots of all queues, then the queues.
struct Layout {
  int size;
  int lanes;

  constexpr int64_t queues() const { return int64_t{size - 1} * lanes; }
  constexpr int64_t bytes() const {
    return queues() * (kSlots * kSlotBytes + static_cast<int64_t>(sizeof(Queues)));
  }
  // From the mailbox's begin, in bytes; `other`: the rank that the owner exchanges with.
  constexpr int64_t slot(int owner, int other, int lane, uint64_t number) const {
    return (queue(owner, other, lane) * kSlots + static_cast<int64_t>(number % kSlots)) *
           kSlotBytes;
  }
  constexpr int64_t state(int owner, int other, int lane) const {
    return queues() * kSlots * kSlotBytes +
           queue(owner, other, lane) * static_cast<int64_t>(sizeof(Queues));
  }

 private:
  constexpr int64_t queue(int owner, int other, int lane) const {
    return int64_t{(other - owner - 1 + size) % size} * lanes + lane;
  }
};

/// Lanes to all other ranks together, about: one alone does not fill a link, and all of them leave
/// multiprocessors to another library's collectives, for whose end a peer may have to wait first.
constexpr int kLanesOfAll = 48;
/// Lanes between any two of `size` ranks.
constexpr int lanes_for(int size) { return std::max(1, kLanesOfAll / std::max(1, size - 1)); }

}  // namespace anabranch::peer
