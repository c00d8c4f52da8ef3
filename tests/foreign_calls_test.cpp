// How a failed call into another library is told. Needs no GPU: the status is made up.
#include <anabranch/error.h>
#include <gtest/gtest.h>

#include <functional>
#include <string>

#include "communicator/nccl/group.h"
#include "support/cuda/handle.h"

namespace anabranch::test {
namespace {

/// `fail` throws an Error, and only that of its library, that has and says call, code, cause and place.
template <typename Error, typename Other>
void expect_failure(const std::function<void()>& fail, const std::string& call, int code,
                    const std::string& cause) {
  try {
    fail();
    ADD_FAILURE() << call << ": nothing was thrown";
  } catch (const ForeignCallError& error) {
    EXPECT_NE(dynamic_cast<const Error*>(&error), nullptr) << error.what();
    EXPECT_EQ(dynamic_cast<const Other*>(&error), nullptr) << error.what();
    EXPECT_EQ(error.call(), call);
    EXPECT_EQ(error.code(), code);
    const std::string text = error.what();
    EXPECT_EQ(text.find(call + " failed: "), 0u) << text;
    EXPECT_NE(text.find(cause), std::string::npos) << text;
    EXPECT_NE(text.find("tests/foreign_calls_test.cpp:"), std::string::npos) << text;
  }
}

TEST(ForeignCalls, CudaAndCublas) {
  expect_failure<CudaError, NcclError>([] { check_cuda(cudaErrorInvalidValue, "cudaFree"); },
                                       "cudaFree", cudaErrorInvalidValue, "cudaErrorInvalidValue");
  expect_failure<CudaError, NcclError>(
      [] { check_cublas(CUBLAS_STATUS_NOT_SUPPORTED, "cublasLtMatmul"); }, "cublasLtMatmul",
      CUBLAS_STATUS_NOT_SUPPORTED, "not supported");
  check_cuda(cudaSuccess, "cudaFree");
  check_cublas(CUBLAS_STATUS_SUCCESS, "cublasCreate");
}

TEST(ForeignCalls, Nccl) {
  expect_failure<NcclError, CudaError>([] { check_nccl(ncclInvalidArgument, "ncclSend"); },
                                       "ncclSend", ncclInvalidArgument, "invalid argument");
  check_nccl(ncclSuccess, "ncclSend");
  check_nccl(ncclInProgress, "ncclCommInitRankConfig");
}

}  // namespace
}  // namespace anabranch::test
