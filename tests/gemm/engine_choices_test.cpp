// What auto keeps from run to run: see auto_engine_test.cpp.
#include "gemm/auto/engine_choices.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <fstream>
#include <thread>

#include "support/shared_directory.h"

namespace anabranch::test {
namespace {

using testing::HasSubstr;
using testing::Not;

bool any(const std::string& /*engine*/) { return true; }
bool all_but_hopper(const std::string& engine) { return engine != "hopper"; }

Product product(const std::string& operation, int64_t rows = 1024) {
  return product_of(operation, torch::kBFloat16, 32, 64, {rows / 2, rows / 2});
}

class EngineChoicesTest : public testing::Test {
 protected:
  void write(const std::string& text) const { std::ofstream(file_) << text; }

  SharedDirectory directory_;
  std::string file_ = directory_.path() / "choices.json";
  EngineChoices::Choice choice_ = {"hopper", {{"hopper", 0.25}, {"cublas_loop_4", 0.5}}};
  EngineChoices::Choice other_ = {"cublas_loop_2", {{"hopper", 0.5}, {"cublas_loop_2", 0.25}}};
};

TEST_F(EngineChoicesTest, AreThereInTheNextRun) {
  file_ = directory_.path() / "no/such/folder" / "choices.json";
  EngineChoices(file_).keep(product("forward"), choice_, any);
  const EngineChoices next(file_);
  const auto found = next.find(product("forward"), any);
  ASSERT_TRUE(found.has_value());
  EXPECT_EQ(found->engine, "hopper");
  EXPECT_EQ(found->milliseconds, choice_.milliseconds);
  EXPECT_TRUE(found->complete);
  EXPECT_FALSE(next.find(product("dgrad"), any).has_value());
  EXPECT_THAT(next.explain(), HasSubstr("choices kept in " + file_));
  EXPECT_THAT(next.explain(),
              HasSubstr("forward BFloat16 2 experts 32 x 64, from 1024 rows, skew 0: "
                        "hopper (cublas_loop_4 0.5 ms, hopper 0.25 ms)"));
}

TEST_F(EngineChoicesTest, ThatLackedMemoryAreOfTheirRunAlone) {
  EngineChoices choices(file_);
  choices.keep(product("whole"), choice_, any);
  choice_.complete = false;
  choices.keep(product("short of memory"), choice_, any);
  EXPECT_TRUE(choices.find(product("short of memory"), any).has_value());
  EXPECT_THAT(choices.explain(), HasSubstr("; the others found no memory"));
  const EngineChoices next(file_);
  EXPECT_TRUE(next.find(product("whole"), any).has_value());
  EXPECT_FALSE(next.find(product("short of memory"), any).has_value());
}

TEST_F(EngineChoicesTest, OfADamagedFileAreMadeAnew) {
  for (const char* damaged : {"", "{", "[1, 2]", R"({"whole": {"engine": 3}})",
                              R"({"a": {"engine": "hopper", "milliseconds": {}}, "b": 1})"}) {
    SCOPED_TRACE(damaged);
    write(damaged);
    EngineChoices choices(file_);
    EXPECT_THAT(choices.explain(), Not(HasSubstr("hopper")));
    choices.keep(product("whole"), choice_, any);
    EXPECT_TRUE(EngineChoices(file_).find(product("whole"), any).has_value());
  }
}

TEST_F(EngineChoicesTest, ThatCannotBeWrittenAreOfTheirRunAlone) {
  write("a file, no folder");
  EngineChoices choices(file_ + "/choices.json");
  choices.keep(product("whole"), choice_, any);
  EXPECT_TRUE(choices.find(product("whole"), any).has_value());
  EXPECT_FALSE(EngineChoices(file_ + "/choices.json").find(product("whole"), any).has_value());
}

// Each process knows what was in the file when it began: none takes away what another has added. On a busy machine one may
// wait long for its turn.
TEST_F(EngineChoicesTest, OfSeveralProcessesAreAllKept) {
  constexpr int kProcesses = 8;
  constexpr int kProducts = 10;
  const auto name = [](int process, int i) { return c10::str("product ", i, " of ", process); };
  std::vector<std::unique_ptr<EngineChoices>> processes;
  for (int process = 0; process < kProcesses; ++process) {
    processes.push_back(std::make_unique<EngineChoices>(file_, std::chrono::minutes{2}));
  }
  std::vector<std::thread> threads;
  for (int process = 0; process < kProcesses; ++process) {
    threads.emplace_back([&, process] {
      for (int i = 0; i < kProducts; ++i) {
        processes[process]->keep(product(name(process, i)), choice_, any);
      }
    });
  }
  for (auto& thread : threads) {
    thread.join();
  }
  const EngineChoices next(file_);
  for (int process = 0; process < kProcesses; ++process) {
    for (int i = 0; i < kProducts; ++i) {
      EXPECT_TRUE(next.find(product(name(process, i)), any).has_value()) << name(process, i);
    }
  }
}

// Two that measure at the same time, with the better luck on either side: the file's first is taken.
TEST_F(EngineChoicesTest, TheFirstIsTakenByAll) {
  EngineChoices first(file_);
  EngineChoices second(file_);
  EXPECT_EQ(first.keep(product("forward"), choice_, any).engine, "hopper");
  EXPECT_EQ(second.keep(product("forward"), other_, any).engine, "hopper");
  EXPECT_EQ(second.find(product("forward"), any)->engine, "hopper");
  EXPECT_EQ(EngineChoices(file_).find(product("forward"), any)->engine, "hopper");
}

TEST_F(EngineChoicesTest, OfAnEngineThatIsNotThereAreMadeAnew) {
  EngineChoices(file_).keep(product("forward"), choice_, any);
  EngineChoices choices(file_);
  EXPECT_FALSE(choices.find(product("forward"), all_but_hopper).has_value());
  EXPECT_FALSE(choices.nearest(product("forward", 2048), all_but_hopper).has_value());
  const auto taken = choices.keep(product("forward"), other_, all_but_hopper);
  EXPECT_EQ(taken.engine, "cublas_loop_2");
  EXPECT_EQ(EngineChoices(file_).find(product("forward"), any)->engine, "cublas_loop_2");
}

TEST_F(EngineChoicesTest, TheNearestIsOfTheSameKind) {
  EngineChoices choices;
  choices.keep(product("forward", 1 << 10), choice_, any);
  choices.keep(product("forward", 1 << 14), other_, any);
  EXPECT_EQ(choices.nearest(product("forward", 1 << 11), any)->engine, "hopper");
  EXPECT_EQ(choices.nearest(product("forward", 1 << 13), any)->engine, "cublas_loop_2");
  EXPECT_EQ(choices.nearest(product("forward", 1 << 20), any)->engine, "cublas_loop_2");
  EXPECT_FALSE(choices.nearest(product("dgrad", 1 << 10), any).has_value());
  const auto wider = product_of("forward", torch::kBFloat16, 40, 64, {512, 512});
  EXPECT_FALSE(choices.nearest(wider, any).has_value());
  const auto of_other_type = product_of("forward", torch::kHalf, 32, 64, {512, 512});
  EXPECT_FALSE(choices.nearest(of_other_type, any).has_value());
}

TEST_F(EngineChoicesTest, TravelAsText) {
  EngineChoices choices;
  choices.keep(product("forward"), choice_, any);
  choice_.complete = false;
  choices.keep(product("dgrad"), choice_, any);
  EngineChoices others;
  others.add(choices.text());
  EXPECT_TRUE(others.find(product("forward"), any).has_value());
  EXPECT_TRUE(others.find(product("dgrad"), any).has_value());
  EXPECT_EQ(others.text(), choices.text());
  EXPECT_THROW(others.add("no choices"), std::runtime_error);
}

TEST(ProductTest, IsReadAsItIsWritten) {
  for (const auto& counts : {std::vector<int64_t>{7, 0, 3}, {1 << 20}, {1, 1, 1, 90000}}) {
    for (const char* operation : {"forward", "wgrad, accumulated", "dgrad with GLU"}) {
      const auto product = product_of(operation, torch::kBFloat16, 1536, 512, counts);
      EXPECT_EQ(parse_product(to_string(product)), product) << to_string(product);
    }
  }
  for (const char* text : {"", " experts ", "forward", "a b experts 1 x 1, from 1 rows, skew 0",
                           "forward 2 experts 32 x 64, from 1024 rows, skew 0 more"}) {
    EXPECT_EQ(parse_product(text), std::nullopt) << text;
  }
}

}  // namespace
}  // namespace anabranch::test
