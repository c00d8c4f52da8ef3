#include <anabranch/grouped_gemm.h>

#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>

#include <array>
#include <numeric>

#include "gemm/baselines.h"
#include "gemm/cpu/cpu_engine.h"
#include "gemm/cuda_engines.h"
#include "kernels/kernels.h"
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
    if (count < 0 || count > rows - total) {  // the message would cost more than the check
      throw InputError(c10::str("grouped GEMM: counts [", c10::Join(", ", counts),
                                "] must be non-negative and sum to the ", rows, " rows"));
    }
    total += count;
  }
  if (total != rows) {
    throw InputError(c10::str("grouped GEMM: counts [", c10::Join(", ", counts), "] sum to ", total,
                              ", not to the ", rows, " rows"));
  }
}

void check_supported(const GroupedGemmEngine& engine, torch::Dtype dtype, int64_t n, int64_t k) {
  check_input(engine.supports(dtype, n, k), "grouped GEMM: the engine ", engine.name(),
              " does not take ", dtype, " weights of ", n, " x ", k);
}

/// Rows whose width is the weight's size `dim`: 2 in forward, 1 in dgrad.
void check_product(const GroupedGemmEngine& engine, const torch::Tensor& rows, const char* name,
                   const torch::Tensor& weight, int64_t dim, const std::vector<int64_t>& counts) {
  check_operand(rows, 2, name, rows);
  check_operand(weight, 3, "weight", rows);
  check_input(weight.size(0) == static_cast<int64_t>(counts.size()), "grouped GEMM: weight of ",
              weight.size(0), " experts with ", counts.size(), " counts");
  check_input(weight.size(dim) == rows.size(1), "grouped GEMM: rows of width ", rows.size(1),
              " against a weight of shape ", weight.sizes());
  check_counts(counts, rows.size(0));
  check_supported(engine, weight.scalar_type(), weight.size(1), weight.size(2));
}

/// `result`: of the weight's sizes, and of the type of `result_like`.
void check_wgrad(const GroupedGemmEngine& engine, const torch::Tensor& dy, const torch::Tensor& x,
                 const std::vector<int64_t>& counts, const torch::Tensor& result, const char* name,
                 const torch::Tensor& result_like) {
  check_operand(dy, 2, "dy", dy);
  check_operand(x, 2, "x", dy);
  check_input(x.size(0) == dy.size(0), "grouped GEMM: dy has ", dy.size(0), " rows and x ",
              x.size(0));
  check_counts(counts, x.size(0));
  const std::array<int64_t, 3> sizes = {static_cast<int64_t>(counts.size()), dy.size(1), x.size(1)};
  check_output(result, sizes, name, result_like);
  check_supported(engine, dy.scalar_type(), dy.size(1), x.size(1));
}

}  // namespace

bool GroupedGemmEngine::supports(torch::Dtype /*dtype*/, int64_t /*n*/, int64_t /*k*/) const {
  return true;
}

std::string GroupedGemmEngine::explain() const { return name(); }

int64_t GroupedGemmEngine::padding_rows(const std::vector<int64_t>& /*counts*/) const { return 0; }

void GroupedGemmEngine::wgrad_accumulate(const torch::Tensor& dy, const torch::Tensor& x,
                                         const std::vector<int64_t>& counts, torch::Tensor& sum) {
  int64_t first_row = 0;
  for (size_t e = 0; e < counts.size(); ++e) {
    const auto rows_of = [&](const torch::Tensor& tensor) {
      return tensor.narrow(0, first_row, counts[e]).to(sum.scalar_type());
    };
    sum[static_cast<int64_t>(e)].addmm_(rows_of(dy).t(), rows_of(x));
    first_row += counts[e];
  }
}

torch::Tensor GroupedGemmEngine::forward_activated(const torch::Tensor& x,
                                                   const torch::Tensor& weight,
                                                   const std::vector<int64_t>& counts,
                                                   const HiddenActivation& activation,
                                                   torch::Tensor& hidden) {
  forward(x, weight, counts, hidden);
  return kernels_for(x.device()).activate(hidden, activation.activation, activation.glu);
}

void GroupedGemmEngine::dgrad_activated(const torch::Tensor& dy, const torch::Tensor& weight,
                                        const std::vector<int64_t>& counts,
                                        const HiddenActivation& activation,
                                        const torch::Tensor& hidden, const torch::Tensor& values,
                                        ActivatedGradient& gradient) {
  dgrad(dy, weight, counts, gradient.activated);
  kernels_for(dy.device())
      .activate_backward(gradient.activated, hidden, values, activation.activation, activation.glu,
                         {gradient.dhidden, gradient.dvalues});
}

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
  check_product(engine, x, "x", weight, 2, counts);
  check_output(y, {x.size(0), weight.size(1)}, "y", x);
  engine.forward(x, weight, counts, y);
}

torch::Tensor grouped_gemm_activated(GroupedGemmEngine& engine, const torch::Tensor& x,
                                     const torch::Tensor& weight,
                                     const std::vector<int64_t>& counts,
                                     const HiddenActivation& activation, torch::Tensor& hidden) {
  check_product(engine, x, "x", weight, 2, counts);
  check_output(hidden, {x.size(0), weight.size(1)}, "hidden", x);
  check_input(!activation.glu || weight.size(1) % 2 == 0, "grouped GEMM: a weight of shape ",
              weight.sizes(), " has no gate and up half");
  return engine.forward_activated(x, weight, counts, activation, hidden);
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
  check_product(engine, dy, "dy", weight, 1, counts);
  check_output(dx, {dy.size(0), weight.size(2)}, "dx", dy);
  engine.dgrad(dy, weight, counts, dx);
}

void grouped_gemm_dgrad_activated(GroupedGemmEngine& engine, const torch::Tensor& dy,
                                  const torch::Tensor& weight, const std::vector<int64_t>& counts,
                                  const HiddenActivation& activation, const torch::Tensor& hidden,
                                  const torch::Tensor& values,
                                  GroupedGemmEngine::ActivatedGradient& gradient) {
  check_product(engine, dy, "dy", weight, 1, counts);
  const int64_t n = weight.size(2);
  const int64_t hidden_width = activation.glu ? 2 * n : n;
  check_output(hidden, {dy.size(0), hidden_width}, "hidden", dy);
  check_output(gradient.dhidden, {dy.size(0), hidden_width}, "dhidden", dy);
  check_output(gradient.activated, {dy.size(0), n}, "activated", dy);
  const auto of_values = torch::empty({0}, dy.options().dtype(at::toOpMathType(dy.scalar_type())));
  check_output(gradient.dvalues, {dy.size(0)}, "dvalues", of_values);
  if (values.defined()) {
    check_output(values, {dy.size(0)}, "values", of_values);
  }
  engine.dgrad_activated(dy, weight, counts, activation, hidden, values, gradient);
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
  check_wgrad(engine, dy, x, counts, dweight, "dweight", dy);
  engine.wgrad(dy, x, counts, dweight);
}

void grouped_gemm_wgrad_accumulate(GroupedGemmEngine& engine, const torch::Tensor& dy,
                                   const torch::Tensor& x, const std::vector<int64_t>& counts,
                                   torch::Tensor& sum) {
  check_operand(dy, 2, "dy", dy);
  const auto type = at::toOpMathType(dy.scalar_type());
  check_wgrad(engine, dy, x, counts, sum, "sum", at::empty({0}, dy.options().dtype(type)));
  engine.wgrad_accumulate(dy, x, counts, sum);
}

std::vector<std::string> grouped_gemm_engines(torch::Device device) {
  check_input(device.is_cpu() || device.is_cuda(), "there is no grouped GEMM for ", device);
  auto names = device.is_cuda() ? cuda_engine_names(device) : std::vector<std::string>{"cpu"};
  const auto baselines = baseline_engine_names();
  names.insert(names.end(), baselines.begin(), baselines.end());
  return names;
}

std::shared_ptr<GroupedGemmEngine> make_grouped_gemm_engine(torch::Device device,
                                                            const std::string& name) {
  const auto names = grouped_gemm_engines(device);
  check_input(name == "auto" || std::find(names.begin(), names.end(), name) != names.end(),
              "grouped GEMM engine \"", name, "\" is unknown on ", device, ": choose auto or ",
              c10::Join(", ", names));
  if (auto baseline = make_baseline_engine(device, name)) {
    return baseline;
  }
  return device.is_cuda() ? make_cuda_engine(device, name) : make_cpu_engine();
}

}  // namespace anabranch
