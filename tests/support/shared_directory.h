#pragma once

#include <filesystem>

namespace anabranch::test {

/// An empty directory that every rank of the test's world sees, removed in the end. Collective.
class SharedDirectory {
 public:
  SharedDirectory();
  ~SharedDirectory();
  SharedDirectory(const SharedDirectory&) = delete;
  SharedDirectory& operator=(const SharedDirectory&) = delete;

  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

}  // namespace anabranch::test
