#pragma once

#include <filesystem>
#include <string>

namespace train_lm {

/// Writes `content` aside and, once it is on disk, gives it the name `file`: whatever happens meanwhile, the
/// name has the old content or the new. Throws std::system_error with the call and the file.
void replace_file(const std::filesystem::path& file, const std::string& content);

}  // namespace train_lm
