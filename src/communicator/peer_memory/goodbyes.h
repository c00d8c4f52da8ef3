#pragma once

#include <anabranch/communicator.h>

#include <atomic>
#include <string>

namespace anabranch {

/// Who has left a group of ranks of one host, and who has unmapped whose memory: in memory of the host's that
/// all share, which outlives each of them. The memory itself is no place for that: whoever has unmapped it
/// cannot write there.
class Goodbyes {
 public:
  /// Collective over `bootstrap`. Throws CommunicationError on all ranks where any cannot share memory.
  explicit Goodbyes(Communicator& bootstrap);
  Goodbyes(const Goodbyes&) = delete;
  Goodbyes& operator=(const Goodbyes&) = delete;

  /// This rank uses nobody's memory any more.
  void leave() const noexcept;
  /// It has unmapped `owner`'s.
  void unmap(int owner) const noexcept;
  /// Whether all other ranks have left the group.
  bool all_have_left() const noexcept { return all_have(kLeft); }
  /// Whether they have unmapped this rank's memory.
  bool all_have_unmapped() const noexcept { return all_have(kUnmapped); }

 private:
  using Flag = std::atomic<int>;
  enum State { kUses, kLeft, kUnmapped };
  bool all_have(State state) const noexcept;
  void open(const std::string& name, bool creates);

  int rank_;
  int size_;
  struct Mapping {
    Mapping() = default;
    ~Mapping();
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;
    Flag* flags = nullptr;  ///< [owner, other]: the other's State
    size_t bytes = 0;
  };
  Mapping mapping_;
};

}  // namespace anabranch
