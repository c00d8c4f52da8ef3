#pragma once

#include <gtest/gtest.h>
#include <torch/types.h>

#include <cstdint>
#include <string>

namespace anabranch::test {

// How far a correct result may lie from the exact one
//
// A sum of n terms computed with unit roundoff u errs by at most n·u·Σ|terms| (Higham, Accuracy and
// Stability, 4.2), each rounding of a stored result adds u of the stored type. So a result made by
// `reduction_length` additions, in the accumulation type (fp32; fp64 for fp64), and `roundings`
// roundings to `dtype` on the way errs by at most
//
//     magnitude · (reduction_length · u(accumulation) + roundings · u(dtype)),
//
// where magnitude bounds Σ|terms|. That holds always.
double tolerance(torch::Dtype dtype, int64_t reduction_length, double magnitude,
                 int64_t roundings = 1);
/// The same, element by element.
torch::Tensor tolerance(torch::Dtype dtype, int64_t reduction_length,
                        const torch::Tensor& magnitude, int64_t roundings = 1);

/// Where stages follow one another (a whole layer) the bound above grows far beyond what happens:
/// independent roundings add up as the root of their squares (Higham & Mary 2019). So with
/// `root_sum_square`, √Σ terms², of all that a result is made of,
///
///     root_sum_square · (reduction_length · u(accumulation) + 6 · √roundings · u(dtype)),
///
/// six deviations, each counted as a whole roundoff. Lengths and roundings of the stages add up; the
/// first term covers sums whose partial sums grow in proportion to their length.
double tolerance_of_stages(torch::Dtype dtype, int64_t reduction_length, double root_sum_square,
                           int64_t roundings);

/// Half the distance from 1 to the next larger number.
double unit_roundoff(torch::Dtype dtype);
/// fp64 for fp64, otherwise fp32.
torch::Dtype accumulation_type(torch::Dtype dtype);

/// |actual − expected| ≤ allowed in every element, compared in fp64 on the CPU; the message shows the
/// worst one. NaN is never close.
::testing::AssertionResult close(const torch::Tensor& actual, const torch::Tensor& expected,
                                 const torch::Tensor& allowed);
::testing::AssertionResult close(const torch::Tensor& actual, const torch::Tensor& expected,
                                 double allowed);
/// Same type, shape and bits.
::testing::AssertionResult identical(const torch::Tensor& actual, const torch::Tensor& expected);

/// Largest absolute value; 0 if empty.
double max_abs(const torch::Tensor& tensor);

std::string to_string(torch::Dtype dtype);

}  // namespace anabranch::test
