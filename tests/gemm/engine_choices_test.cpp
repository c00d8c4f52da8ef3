// What auto keeps from run to run: see auto_engine_test.cpp.
#include "gemm/auto/engine_choices.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>

#include "support/shared_directory.h"

namespace anabranch::test {
namespace {

using testing::HasSubstr;
using testing::Not;

class EngineChoicesTest : public testing::Test {
 protected:
  void write(const std::string& text) const { std::ofstream(file_) << text; }

  SharedDirectory directory_;
  std::string file_ = directory_.path() / "choices.json";
  EngineChoices::Choice choice_ = {"hopper", {{"hopper", 0.25}, {"cublas_loop_4", 0.5}}};
};

TEST_F(EngineChoicesTest, AreThereInTheNextRun) {
  file_ = directory_.path() / "no/such/folder" / "choices.json";
  EngineChoices(file_).keep("forward of 8 experts", choice_);
  const EngineChoices next(file_);
  const auto found = next.find("forward of 8 experts");
  ASSERT_TRUE(found.has_value());
  EXPECT_EQ(found->engine, "hopper");
  EXPECT_EQ(found->milliseconds, choice_.milliseconds);
  EXPECT_TRUE(found->complete);
  EXPECT_FALSE(next.find("forward of 9 experts").has_value());
  EXPECT_THAT(next.explain(), HasSubstr("choices kept in " + file_));
  EXPECT_THAT(next.explain(),
              HasSubstr("forward of 8 experts: hopper (cublas_loop_4 0.5 ms, hopper 0.25 ms)"));
}

TEST_F(EngineChoicesTest, ThatLackedMemoryAreOfTheirRunAlone) {
  EngineChoices choices(file_);
  choices.keep("whole", choice_);
  choice_.complete = false;
  choices.keep("short of memory", choice_);
  EXPECT_TRUE(choices.find("short of memory").has_value());
  EXPECT_THAT(choices.explain(), HasSubstr("; the others found no memory"));
  const EngineChoices next(file_);
  EXPECT_TRUE(next.find("whole").has_value());
  EXPECT_FALSE(next.find("short of memory").has_value());
}

TEST_F(EngineChoicesTest, OfADamagedFileAreMadeAnew) {
  for (const char* damaged : {"", "{", "[1, 2]", R"({"whole": {"engine": 3}})",
                              R"({"a": {"engine": "hopper", "milliseconds": {}}, "b": 1})"}) {
    SCOPED_TRACE(damaged);
    write(damaged);
    EngineChoices choices(file_);
    EXPECT_THAT(choices.explain(), Not(HasSubstr("hopper")));
    choices.keep("whole", choice_);
    EXPECT_TRUE(EngineChoices(file_).find("whole").has_value());
  }
}

TEST_F(EngineChoicesTest, ThatCannotBeWrittenAreOfTheirRunAlone) {
  write("a file, no folder");
  EngineChoices choices(file_ + "/choices.json");
  choices.keep("whole", choice_);
  EXPECT_TRUE(choices.find("whole").has_value());
  EXPECT_FALSE(EngineChoices(file_ + "/choices.json").find("whole").has_value());
}

}  // namespace
}  // namespace anabranch::test
