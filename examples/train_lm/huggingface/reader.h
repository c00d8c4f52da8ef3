#pragma once

#include <anabranch/safetensors.h>
#include <torch/types.h>

#include <filesystem>
#include <map>
#include <string>

namespace train_lm {

// The file of a folder of transformers' that has all tensors, or, of several, the one that says which has which.
inline constexpr const char* kHfFile = "model.safetensors";
inline constexpr const char* kHfIndex = "model.safetensors.index.json";

/// The tensors of a folder, of which a file is opened when one of its tensors is asked for. Throws
/// std::invalid_argument for what is not as it must be.
class HfReader {
 public:
  explicit HfReader(std::filesystem::path folder);

  /// Of every tensor the file that has it.
  const std::map<std::string, std::string>& names() const { return file_of_; }

  torch::Tensor read(const std::string& name, at::IntArrayRef shape);

 private:
  const anabranch::SafetensorsReader& open(const std::string& file);

  std::filesystem::path folder_;
  std::map<std::string, std::string> file_of_;
  std::map<std::string, anabranch::SafetensorsReader> files_;
};

}  // namespace train_lm
