#include "huggingface/reader.h"

#include <fstream>
#include <nlohmann/json.hpp>
#include <utility>

#include "require.h"

namespace train_lm {

HfReader::HfReader(std::filesystem::path folder) : folder_(std::move(folder)) {
  const auto index_file = folder_ / kHfIndex;
  if (!std::filesystem::exists(index_file)) {
    for (const auto& [name, entry] : open(kHfFile).entries()) file_of_[name] = kHfFile;
    return;
  }
  std::ifstream text(index_file);
  const auto index = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  require(index.is_object() && index.contains("weight_map") && index["weight_map"].is_object(),
          index_file.string(), " has no weight_map");
  for (const auto& [name, file] : index["weight_map"].items()) {
    require(file.is_string() && file.get<std::string>().find('/') == std::string::npos,
            index_file.string(), ": ", name, " is in no file of the folder");
    file_of_[name] = file;
  }
}

torch::Tensor HfReader::read(const std::string& name, at::IntArrayRef shape) {
  const auto found = file_of_.find(name);
  require(found != file_of_.end(), folder_.string(), " has no ", name);
  auto tensor = open(found->second).read(name);
  require(tensor.sizes() == shape, folder_.string(), ": ", name, " has shape ", tensor.sizes(),
          ", the model's is ", shape);
  return tensor;
}

const anabranch::SafetensorsReader& HfReader::open(const std::string& file) {
  const auto known = files_.find(file);
  return known != files_.end() ? known->second
                               : files_.try_emplace(file, folder_ / file).first->second;
}

}  // namespace train_lm
