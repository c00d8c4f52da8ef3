#include "replace_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

namespace train_lm {
namespace {

void check(bool good, const char* call, const std::filesystem::path& file) {
  if (!good) {
    throw std::system_error(errno, std::generic_category(),
                            std::string(call) + ' ' + file.string());
  }
}

/// A descriptor that is closed in the end.
class Descriptor {
 public:
  Descriptor(const std::filesystem::path& file, int flags)
      : number_(::open(file.c_str(), flags | O_CLOEXEC, 0666)) {
    check(number_ >= 0, "open", file);
  }
  ~Descriptor() { ::close(number_); }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int operator*() const { return number_; }

 private:
  int number_;
};

}  // namespace

void replace_file(const std::filesystem::path& file, const std::string& content) {
  auto aside = file;
  aside += ".partial";
  const Descriptor descriptor(aside, O_WRONLY | O_CREAT | O_TRUNC);
  for (size_t written = 0; written < content.size();) {
    const auto count = ::write(*descriptor, content.data() + written, content.size() - written);
    check(count >= 0 || errno == EINTR, "write", aside);
    written += count > 0 ? static_cast<size_t>(count) : 0;
  }
  check(::fsync(*descriptor) == 0, "fsync", aside);
  std::filesystem::rename(aside, file);
  const Descriptor folder(file.parent_path(), O_RDONLY | O_DIRECTORY);
  check(::fsync(*folder) == 0, "fsync", file.parent_path());
}

}  // namespace train_lm
