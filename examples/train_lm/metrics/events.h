#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <nlohmann/json_fwd.hpp>
#include <string>

namespace train_lm {

/// A file of TensorBoard's, events.out.tfevents.*: records of TFRecord (length, masked CRC-32C of it, data,
/// masked CRC-32C of that) whose data are Event messages of tensorflow/core/util/event.proto.
class EventFile {
 public:
  /// A new file in `folder`. Events of `first_step` and later steps in earlier files there are void.
  EventFile(const std::filesystem::path& folder, int64_t first_step);

  /// The numbers in a line of metrics, as scalars of its "step": those in objects and arrays of it as
  /// "name/key" and "name/index"; arrays of arrays are left out.
  void write(const nlohmann::json& line);

 private:
  void write_record(const std::string& data);

  std::ofstream stream_;
};

}  // namespace train_lm
