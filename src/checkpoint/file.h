#pragma once

#include <cstdint>
#include <filesystem>

namespace anabranch {

/// An open file. Every failure is a CheckpointError with the call, the path and the cause.
class File {
 public:
  static File open(const std::filesystem::path& path);
  /// A file that must not exist yet, for writing.
  static File create(const std::filesystem::path& path);
  ~File();
  File(File&& other) noexcept;
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  int64_t size() const;
  /// Exactly `bytes` bytes from `offset`; an earlier end of the file is an error.
  void read(void* data, int64_t bytes, int64_t offset) const;
  /// Appends.
  void write(const void* data, int64_t bytes);
  /// Returns when what was written will survive a crash of the machine.
  void sync();

 private:
  File(std::filesystem::path path, int flags);

  std::filesystem::path path_;
  int descriptor_;
};

/// Makes the names in a directory survive a crash of the machine.
void sync_directory(const std::filesystem::path& directory);

/// Makes the directory and those above it that are missing; all of them then survive a crash of the
/// machine.
void make_directories(const std::filesystem::path& directory);

/// Atomically gives `from` the name `to`, replacing what had it.
void rename_file(const std::filesystem::path& from, const std::filesystem::path& to);

}  // namespace anabranch
