#include "gemm/auto/file_lock.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <thread>

namespace anabranch {

FileLock::FileLock(const std::string& file, std::chrono::milliseconds patience) {
  // For writing: over NFS the lock is one of the server's on the file's bytes, which asks for that.
  const int opened = ::open(file.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  if (opened < 0) {
    return;
  }
  const auto end = std::chrono::steady_clock::now() + patience;
  while (::flock(opened, LOCK_EX | LOCK_NB) != 0) {
    if ((errno != EWOULDBLOCK && errno != EINTR) || std::chrono::steady_clock::now() > end) {
      ::close(opened);
      return;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  descriptor_ = opened;
}

FileLock::~FileLock() {
  if (held()) {
    ::close(descriptor_);  // frees the lock
  }
}

}  // namespace anabranch
