#include <anabranch/grouped_gemm.h>

#include <ATen/ops/empty.h>

#include <numeric>

#include "gemm/cpu_engine.h"
#include "gemm/cuda_engines.h"
#include "support/check.h"

namespace anabranch {
namespace {

void check_operand(const torch::Tensor& tensor, int64_t dim, const char* name,
                   const torch::Tensor& like) {
  check_input(tensor.defined(), "grouped GEMM: ", name, " is undefined");
  check_input(tensor.dim() == dim && tensor.is_contiguous(), "grouped GEMM: ", name, " is ",
              tensor.sizes(), tensor.is_contiguous() ? "" : " and not contiguous",
              ", expected a contiguous tensor of ", dim, " dimensions");
  check_input(at::isFloatingType(tensor.scalar_type()) &&
                  tensor.scalar_type() == like.scalar_type() && tensor.device() == like.device(),
              "grouped GEMM: ", name, " is ", tensor.scalar_type(), " on ", tensor.device(),
              ", expected one floating type and device as ", like.scalar_type(), " on ",
              like.device());
}

void check_output(const torch::Tensor& tensor, at::IntArrayRef sizes, const char* name,
                  const torch::Tensor& like) {
  check_operand(tensor, static_cast<int64_t>(sizes.size()), name, like);
  check_input(tensor.sizes() == sizes, "grouped GEMM: ", name, " is ", tensor.sizes(),
              ", expected ", sizes);
}

void check_counts(const std::vector<int64_t>& counts, int64_t rows) {
  int64_t total = 0;
  for (const int64_t count : counts) {
    check_input(count >= 0 && count <= rows - total, "grouped GEMM: counts [",
                c10::Join(", ", counts), "] must be non-negative and sum to the ", rows, " rows");
    total += count;
  }
  check_input(total == rows, "grouped GEMM: counts [", c10::Join(", ", counts), "] sum to ", total,
              ", not to the ", rows, " rows");
}

void check_weight(const torch::Tensor& weight, int64_t width, int64_t dim,
                  const std::vector<int64_t>& counts) {
  check_input(weight.size(0) == static_cast<int64_t>(counts.size()), "grouped GEMM: weight of ",
              weight.size(0), " experts with ", counts.size(), " counts");
  check_input(weight.size(dim) == width, "grouped GEMM: rows of width ", width,
              " against a weight of shape ", weight.sizes());
}

}  // namespace

torch::Tensor grouped_gemm(GroupedGemmEngine& engine, const torch::Tensor& x,
                           const torch::Tensor& weight, const std::vector<int64_t>& counts) {
  check_operand(x, 2, "x", x);
  check_operand(weight, 3, "weight", x);
  torch::Tensor y = at::empty({x.size(0), weight.size(1)}, x.options());
  grouped_gemm_out(engine, x, weight, counts, y);
  return y;
}

void grouped_gemm_out(GroupedGemmEngine& engine, const torch::Tensor& x,
                      const torch::Tensor& weight, const std::vector<int64_t>& counts,
                      torch::Tensor& y) {
  check_operand(x, 2, "x", x);
  check_operand(weight, 3, "weight", x);
  check_weight(weight, x.size(1), 2, counts);
  check_counts(counts, x.size(0));
  check_output(y, {x.size(0), weight.size(1)}, "y", x);
  engine.forward(x, weight, counts, y);
}

torch::Tensor grouped_gemm_dgrad(GroupedGemmEngine& engine, const torch::Tensor& dy,
                                 const torch::Tensor& weight, const std::vector<int64_t>& counts) {
  check_operand(dy, 2, "dy", dy);
  check_operand(weight, 3, "weight", dy);
  torch::Tensor dx = at::empty({dy.size(0), weight.size(2)}, dy.options());
  grouped_gemm_dgrad_out(engine, dy, weight, counts, dx);
  return dx;
}

void grouped_gemm_dgrad_out(GroupedGemmEngine& engine, const torch::Tensor& dy,
                            const torch::Tensor& weight, const std::vector<int64_t>& counts,
                            torch::Tensor& dx) {
  check_operand(dy, 2, "dy", dy);
  check_operand(weight, 3, "weight", dy);
  check_weight(weight, dy.size(1), 1, counts);
  check_counts(counts, dy.size(0));
  check_output(dx, {dy.size(0), weight.size(2)}, "dx", dy);
  engine.dgrad(dy, weight, counts, dx);
}

torch::Tensor grouped_gemm_wgrad(GroupedGemmEngine& engine, const torch::Tensor& dy,
                                 const torch::Tensor& x, const std::vector<int64_t>& counts) {
  check_operand(dy, 2, "dy", dy);
  check_operand(x, 2, "x", dy);
  torch::Tensor dweight =
      at::empty({static_cast<int64_t>(counts.size()), dy.size(1), x.size(1)}, dy.options());
  grouped_gemm_wgrad_out(engine, dy, x, counts, dweight);
  return dweight;
}

void grouped_gemm_wgrad_out(GroupedGemmEngine& engine, const torch::Tensor& dy,
                            const torch::Tensor& x, const std::vector<int64_t>& counts,
                            torch::Tensor& dweight) {
  check_operand(dy, 2, "dy", dy);
  check_operand(x, 2, "x", dy);
  check_input(x.size(0) == dy.size(0), "grouped GEMM: dy has ", dy.size(0), " rows and x ",
              x.size(0));
  check_counts(counts, x.size(0));
  check_output(dweight, {static_cast<int64_t>(counts.size()), dy.size(1), x.size(1)}, "dweight",
               dy);
  engine.wgrad(dy, x, counts, dweight);
}

std::vector<std::string> grouped_gemm_engines(torch::Device device) {
  check_input(device.is_cpu() || device.is_cuda(), "there is no grouped GEMM for ", device);
  return device.is_cuda() ? cuda_engine_names() : std::vector<std::string>{"cpu"};
}

std::shared_ptr<GroupedGemmEngine> make_grouped_gemm_engine(torch::Device device,
                                                            const std::string& name) {
  const auto names = grouped_gemm_engines(device);
  check_input(name == "auto" || std::find(names.begin(), names.end(), name) != names.end(),
              "grouped GEMM engine \"", name, "\" is unknown on ", device, ": choose auto or ",
              c10::Join(", ", names));
  if (device.is_cuda()) {
    return make_cuda_engine(device, name);
  }
  return make_cpu_engine();
}

}  // namespace anabranch
