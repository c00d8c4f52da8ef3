#include "checkpoint/file.h"

#include <anabranch/error.h>
#include <c10/util/StringUtil.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <system_error>
#include <utility>

namespace anabranch {
namespace {

[[noreturn]] void fail(const char* call, const std::filesystem::path& path) {
  const int error = errno;
  throw CheckpointError(
      c10::str(call, " ", path.string(), ": ", std::generic_category().message(error)));
}

}  // namespace

File::File(std::filesystem::path path, int flags)
    : path_(std::move(path)), descriptor_(::open(path_.c_str(), flags | O_CLOEXEC, 0666)) {
  if (descriptor_ < 0) fail("open", path_);
}

// Without O_NONBLOCK the name of a pipe would wait for a writer; files and directories do not mind it.
File File::open(const std::filesystem::path& path) { return File(path, O_RDONLY | O_NONBLOCK); }

File File::create(const std::filesystem::path& path) {
  return File(path, O_WRONLY | O_CREAT | O_EXCL);
}

File::File(File&& other) noexcept
    : path_(std::move(other.path_)), descriptor_(std::exchange(other.descriptor_, -1)) {}

// Nothing is lost by a close that fails: what matters was synced before.
File::~File() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

int64_t File::size() const {
  struct stat status {};
  if (::fstat(descriptor_, &status) != 0) fail("fstat", path_);
  if (!S_ISREG(status.st_mode)) throw CheckpointError(path_.string() + " is not a regular file");
  return status.st_size;
}

void File::read(void* data, int64_t bytes, int64_t offset) const {
  auto* out = static_cast<char*>(data);
  for (int64_t done = 0; done < bytes;) {
    const auto count =
        ::pread(descriptor_, out + done, static_cast<size_t>(bytes - done), offset + done);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) fail("pread", path_);
    if (count == 0) {
      throw CheckpointError(c10::str(path_.string(), " ends at byte ", offset + done, ", ",
                                     bytes - done, " bytes too early"));
    }
    done += count;
  }
}

void File::write(const void* data, int64_t bytes) {
  const auto* in = static_cast<const char*>(data);
  for (int64_t done = 0; done < bytes;) {
    const auto count = ::write(descriptor_, in + done, static_cast<size_t>(bytes - done));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) fail("write", path_);
    done += count;
  }
}

void File::sync() {
  if (::fsync(descriptor_) != 0) fail("fsync", path_);
}

void sync_directory(const std::filesystem::path& directory) { File::open(directory).sync(); }

void make_directories(const std::filesystem::path& directory) {
  std::filesystem::path made;
  std::filesystem::path parent;
  for (const auto& part : std::filesystem::absolute(directory)) {
    if (part.empty()) continue;  // behind a trailing slash
    parent = made;
    made /= part;
    if (std::filesystem::create_directory(made)) sync_directory(parent);
  }
  sync_directory(parent);  // an earlier save may have ended before it came to this
}

void rename_file(const std::filesystem::path& from, const std::filesystem::path& to) {
  if (std::rename(from.c_str(), to.c_str()) != 0) fail("rename", from);
}

}  // namespace anabranch
