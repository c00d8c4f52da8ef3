#pragma once

#include <anabranch/communicator.h>

#include <atomic>
#include <string>

namespace anabranch {

/// Who has done with whose memory, among ranks of one host: in memory of the host's that all share, which
/// outlives each of them. The memory itself is no place for that: whoever has unmapped it cannot write
/// there.
class Goodbyes {
 public:
  /// Collective over `bootstrap`. Throws CommunicationError on all ranks where any cannot share memory.
  explicit Goodbyes(Communicator& bootstrap);
  Goodbyes(const Goodbyes&) = delete;
  Goodbyes& operator=(const Goodbyes&) = delete;

  /// This rank does not use `owner`'s memory any more.
  void leave(int owner) const noexcept;
  /// Whether all other ranks have left this one's.
  bool all_have_left() const noexcept;

 private:
  using Flag = std::atomic<int>;
  void open(const std::string& name, bool creates);

  int rank_;
  int size_;
  struct Mapping {
    Mapping() = default;
    ~Mapping();
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;
    Flag* flags = nullptr;  ///< [owner, other]: the other has left
    size_t bytes = 0;
  };
  Mapping mapping_;
};

}  // namespace anabranch
