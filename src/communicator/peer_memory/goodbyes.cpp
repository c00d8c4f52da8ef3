#include "communicator/peer_memory/goodbyes.h"

#include <c10/util/StringUtil.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <random>
#include <stdexcept>

#include "communicator/agreement.h"

namespace anabranch {
namespace {

[[noreturn]] void fail(const char* call) {
  throw std::runtime_error(c10::str(call, " failed: ", std::strerror(errno)));
}

/// What rank 0 has made, by its name; nobody needs that when all have mapped it.
struct Segment {
  std::string name;
  Segment() = default;
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;
  ~Segment() {
    if (!name.empty()) {
      shm_unlink(name.c_str());
    }
  }
};

}  // namespace

Goodbyes::Goodbyes(Communicator& bootstrap) : rank_(bootstrap.rank()), size_(bootstrap.size()) {
  static_assert(Flag::is_always_lock_free);
  Segment segment;
  std::string& name = segment.name;
  succeed_together(bootstrap, [&] {
    if (rank_ == 0) {
      std::random_device device;
      name = c10::str("/anabranch-", getpid(), '-', device(), '-', device());
      open(name, /*creates=*/true);
    }
  });
  const std::string shared = all_gather_strings(bootstrap, name)[0];
  succeed_together(bootstrap, [&] {
    if (rank_ != 0) {
      open(shared, /*creates=*/false);
    }
  });
}

Goodbyes::Mapping::~Mapping() {
  if (flags != nullptr) {
    munmap(flags, bytes);
  }
}

void Goodbyes::open(const std::string& name, bool creates) {
  const int descriptor = shm_open(
      name.c_str(), O_RDWR | O_CLOEXEC | (creates ? O_CREAT | O_EXCL : 0), S_IRUSR | S_IWUSR);
  if (descriptor < 0) {
    fail("shm_open");
  }
  const auto bytes = static_cast<size_t>(size_) * static_cast<size_t>(size_) * sizeof(Flag);
  const bool sized = !creates || ftruncate(descriptor, static_cast<off_t>(bytes)) == 0;
  void* memory =
      sized ? mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0) : MAP_FAILED;
  const int error = errno;
  close(descriptor);
  if (memory == MAP_FAILED) {
    errno = error;
    fail("mapping shared memory");
  }
  mapping_.flags = static_cast<Flag*>(memory);  // zeros: kUses
  mapping_.bytes = bytes;
}

void Goodbyes::leave() const noexcept {
  for (int owner = 0; owner < size_; ++owner) {
    mapping_.flags[owner * size_ + rank_].store(kLeft);
  }
}

void Goodbyes::unmap(int owner) const noexcept {
  mapping_.flags[owner * size_ + rank_].store(kUnmapped);
}

bool Goodbyes::all_have(State state) const noexcept {
  for (int other = 0; other < size_; ++other) {
    if (other != rank_ && mapping_.flags[rank_ * size_ + other].load() < state) {
      return false;
    }
  }
  return true;
}

}  // namespace anabranch
