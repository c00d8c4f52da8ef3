#include "kernels/kernels_fixture.h"

namespace anabranch::test {
namespace {

class RowsTest : public KernelsTest {
 protected:
  /// Groups of 0 to 4 of `members` numbers, in a random order.
  Csr random_groups(int64_t members) {
    std::vector<int64_t> offsets = {0};
    while (offsets.back() < members) {
      offsets.push_back(std::min(members, offsets.back() + random_.integer(0, 4)));
    }
    return {torch::tensor(offsets, torch::kInt64), random_.permutation(members)};
  }
  Csr on_device(const Csr& csr) const {
    return {csr.offsets.to(GetParam()), csr.members.to(GetParam())};
  }
  using KernelsTest::on_device;
};
ANABRANCH_FOR_EACH_DEVICE(RowsTest);

TEST_P(RowsTest, GatherCopiesRows) {
  for (const auto dtype : {torch::kFloat32, torch::kFloat64, torch::kBFloat16, torch::kFloat16,
                           torch::kInt64, torch::kInt32}) {
    for (const int64_t width : {1, 2, 7, 8, 64, 129}) {
      for (const int64_t count : {0, 1, 500}) {
        const auto rows = (100 * random_.normal({70, width})).to(dtype);
        const auto index = (random_.uniform({count}) * 70).floor().to(torch::kInt64);
        EXPECT_TRUE(identical(rows_.gather_rows(on_device(rows), on_device(index)).cpu(),
                              rows.index_select(0, index)))
            << to_string(dtype) << " width " << width << " count " << count;
      }
    }
  }
}

TEST_P(RowsTest, GatherTakesVectors) {
  for (const auto dtype : {torch::kFloat32, torch::kFloat64, torch::kInt64, torch::kInt32}) {
    const auto values = (100 * random_.normal({70})).to(dtype);
    const auto index = random_.permutation(70);
    EXPECT_TRUE(identical(rows_.gather_rows(on_device(values), on_device(index)).cpu(),
                          values.index_select(0, index)));
  }
}

TEST_P(RowsTest, ScatterCopiesEachRowToItsPlaces) {
  for (const auto dtype : all_dtypes()) {
    for (const int64_t width : {1, 7, 8, 129, 1100}) {
      for (const int64_t members : {0, 1, 90, 700, 10000}) {
        const auto groups = random_groups(members);
        const auto count = groups.offsets.size(0) - 1;
        const auto rows = random_.normal({count, width}, dtype);
        const auto group_of = torch::arange(count).repeat_interleave(groups.offsets.diff());
        const auto expected = torch::empty({members, width}, dtype)
                                  .index_copy_(0, groups.members, rows.index_select(0, group_of));
        EXPECT_TRUE(
            identical(rows_.scatter_rows(on_device(rows), on_device(groups)).cpu(), expected))
            << to_string(dtype) << " width " << width << " members " << members;
      }
    }
  }
}

TEST_P(RowsTest, ScatterTakesMorePlacesThanAWarpHasLanes) {
  const Csr groups = {torch::tensor({0, 0, 100, 133}, torch::kInt64), random_.permutation(133)};
  const auto rows = random_.normal({3, 24}, torch::kFloat32);
  const auto expected = torch::empty({133, 24}).index_copy_(
      0, groups.members, torch::cat({rows[1].expand({100, 24}), rows[2].expand({33, 24})}));
  EXPECT_TRUE(identical(rows_.scatter_rows(on_device(rows), on_device(groups)).cpu(), expected));
}

TEST_P(RowsTest, SumAddsTheMembersOfAGroup) {
  for (const auto dtype : all_dtypes()) {
    for (const int64_t width : {1, 3, 8, 65, 256}) {
      for (const bool weighted : {false, true}) {
        SCOPED_TRACE(c10::str(to_string(dtype), " width ", width, " weighted ", weighted));
        const auto members = random_.pick<int64_t>({0, 1, 90, 700});
        const auto rows = random_.normal({members, width}, dtype);
        const auto weights = random_.normal({members}, accumulation_type(dtype));
        const auto groups = random_groups(members);
        const auto count = groups.offsets.size(0) - 1;
        auto exact = torch::zeros({count, width}, torch::kFloat64);
        auto magnitude = torch::zeros_like(exact);
        const auto group_of = torch::arange(count).repeat_interleave(groups.offsets.diff());
        auto terms = rows.to(torch::kFloat64).index_select(0, groups.members);
        if (weighted) {
          terms = terms * weights.to(torch::kFloat64).index_select(0, groups.members).unsqueeze(1);
        }
        exact.index_add_(0, group_of, terms);
        magnitude.index_add_(0, group_of, terms.abs());
        const auto result = rows_.sum_rows(on_device(rows), on_device(groups),
                                           weighted ? on_device(weights) : torch::Tensor());
        EXPECT_EQ(result.scalar_type(), dtype);
        EXPECT_TRUE(close(result, exact, tolerance(dtype, 5, magnitude)));
      }
    }
  }
}

TEST_P(RowsTest, SumOfNoMembersIsZero) {
  const Csr empty = {torch::zeros({4}, torch::kInt64), torch::empty({0}, torch::kInt64)};
  const auto sums = rows_.sum_rows(on_device(torch::empty({0, 5})), on_device(empty), {});
  EXPECT_TRUE(identical(sums.cpu(), torch::zeros({3, 5})));
}

// ⟨gather(x), y⟩ = ⟨x, sum(y)⟩ where the groups are those of the index: permute and unpermute.
TEST_P(RowsTest, SumIsTheAdjointOfGather) {
  for (int64_t i = 0; i < effort(20); ++i) {
    const auto rows = random_.integer(1, 80);
    const auto assignments = random_.integer(0, 200);
    const auto index =
        (random_.uniform({assignments}) * static_cast<double>(rows)).floor().to(torch::kInt64);
    const auto groups = plan_.group(on_device(index), rows);
    const auto x = on_device(random_.normal({rows, 9}));
    const auto y = on_device(random_.normal({assignments, 9}));
    const auto gathered = rows_.gather_rows(x, on_device(index));
    const auto forward = (gathered * y).sum().item<double>();
    const auto backward = (x * rows_.sum_rows(y, groups, {})).sum().item<double>();
    EXPECT_NEAR(forward, backward,
                tolerance(torch::kFloat64, 2 * 9 * (assignments + rows),
                          (gathered * y).abs().sum().item<double>()));
  }
}

}  // namespace
}  // namespace anabranch::test
