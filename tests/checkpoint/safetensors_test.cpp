#include <anabranch/error.h>
#include <anabranch/safetensors.h>
#include <gtest/gtest.h>

#include "support/file_size_limit.h"
#include "support/random.h"
#include "support/shared_directory.h"
#include "support/tolerance.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

TEST(Safetensors, HoldsEveryTypeAndShape) {
  const SharedDirectory directory;
  Random random(test_seed());
  std::vector<NamedTensor> tensors;
  for (const auto dtype : {torch::kFloat64, torch::kFloat32, torch::kFloat16, torch::kBFloat16,
                           torch::kFloat8_e4m3fn, torch::kFloat8_e5m2, torch::kInt64, torch::kInt32,
                           torch::kInt16, torch::kInt8, torch::kUInt8, torch::kBool}) {
    for (const std::vector<int64_t>& sizes :
         std::vector<std::vector<int64_t>>{{}, {0}, {1}, {3, 0, 2}, {7}, {3, 5}, {2, 1, 3, 2}}) {
      const auto name = to_string(dtype) + "." + std::to_string(tensors.size());
      tensors.push_back({name, (random.normal(sizes) * 3).abs().to(dtype)});
    }
  }
  tensors.push_back({"transposed", random.normal({4, 6}).t()});
  tensors.push_back({"trained", random.normal({4}).requires_grad_()});
  tensors.push_back({"ünï\"\\\n", random.normal({2})});
  const auto path = directory.path() / std::to_string(world()->rank());
  const auto written = write_safetensors(path, tensors);

  const SafetensorsReader reader(path);
  EXPECT_EQ(reader.file_bytes(), written.bytes);
  EXPECT_EQ(reader.header_checksum(), written.header_checksum);
  EXPECT_EQ(reader.entries().size(), tensors.size());
  for (const auto& [name, tensor] : tensors) {
    const auto loaded = reader.read(name);
    EXPECT_TRUE(identical(loaded, tensor.contiguous())) << name;
    EXPECT_EQ(checksum(loaded), written.checksums.at(name)) << name;
    EXPECT_EQ(reader.entries().at(name).offset % static_cast<int64_t>(tensor.element_size()), 0)
        << name;
  }
}

TEST(Safetensors, HoldsNothing) {
  const SharedDirectory directory;
  const auto path = directory.path() / std::to_string(world()->rank());
  write_safetensors(path, {});
  EXPECT_TRUE(SafetensorsReader(path).entries().empty());
}

// The standard's check value.
TEST(Safetensors, ChecksumIsCrc32) {
  const std::string text = "123456789";
  const auto tensor = torch::from_blob(const_cast<char*>(text.data()), {9}, torch::kUInt8).clone();
  EXPECT_EQ(checksum(tensor), 0xcbf43926u);
}

TEST(Safetensors, RefusesWhatItCannotWrite) {
  const SharedDirectory directory;
  const auto path = directory.path() / std::to_string(world()->rank());
  EXPECT_THROW(write_safetensors(path, {{"a", torch::zeros({2}, torch::kComplexFloat)}}),
               CheckpointError);
  EXPECT_THROW(write_safetensors(path, {{"a", torch::zeros({2})}, {"a", torch::zeros({2})}}),
               CheckpointError);
  EXPECT_FALSE(std::filesystem::exists(path));
  write_safetensors(path, {{"a", torch::zeros({2})}});
  EXPECT_THROW(write_safetensors(path, {{"a", torch::zeros({2})}}), CheckpointError);
  EXPECT_THROW(SafetensorsReader(path).read("b"), CheckpointError);
  EXPECT_THROW(SafetensorsReader(directory.path()), CheckpointError);
}

TEST(Safetensors, WriteThatFailsInTheMiddleIsAnError) {
  const SharedDirectory directory;
  const auto path = directory.path() / std::to_string(world()->rank());
  std::string message;
  {
    const FileSizeLimit limit(1000);
    try {
      write_safetensors(path, {{"a", torch::zeros({10000})}});
    } catch (const CheckpointError& error) {
      message = error.what();
    }
  }
  EXPECT_NE(message.find("write " + path.string()), std::string::npos) << message;
}

}  // namespace
}  // namespace anabranch::test
