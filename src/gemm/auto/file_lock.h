#pragma once

#include <chrono>
#include <string>

namespace anabranch {

/// One holder at a time among all processes, also of hosts that share the file's folder over NFS. Freed when
/// it ends, or its process does.
class FileLock {
 public:
  /// Makes the file if there is none, and waits for up to `patience`.
  FileLock(const std::string& file, std::chrono::milliseconds patience);
  ~FileLock();
  FileLock(const FileLock&) = delete;
  FileLock& operator=(const FileLock&) = delete;

  /// False where it took too long, or there can be no lock there.
  bool held() const { return descriptor_ >= 0; }

 private:
  int descriptor_ = -1;
};

}  // namespace anabranch
