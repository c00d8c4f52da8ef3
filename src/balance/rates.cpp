#include "balance/rates.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <chrono>

namespace anabranch {
namespace {

/// Until the device is done, too: `work` returns a tensor that it computes last.
template <typename Work>
double seconds_of(const Work& work) {
  const auto begin = std::chrono::steady_clock::now();
  work().flatten().narrow(0, 0, 1).cpu();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

/// The second time: the first one makes what later ones find.
template <typename Work>
double seconds_again(Communicator& communicator, const Work& work) {
  seconds_of(work);
  communicator.barrier();
  return seconds_of(work);
}

int64_t weights_of(const ExpertProjections& experts) {
  return experts.up.weight[0].numel() + experts.down.weight[0].numel();
}

/// Seconds an operation; 0 where there is no expert.
double seconds_a_flop(const FeedForward& expert, const ExpertProjections& experts,
                      Communicator& communicator) {
  const int64_t local = experts.up.weight.size(0);
  if (local == 0) {
    communicator.barrier();
    return 0;
  }
  const auto& weight = experts.up.weight;
  const int64_t rows = weight.is_cuda() ? 1024 : 64;
  const auto x = at::ones({local * rows, weight.size(2)}, weight.options());
  const ExpertCounts counts(std::vector<int64_t>(local, rows));
  const double seconds = seconds_again(communicator, [&] {
    return feed_forward(expert, {x, {}}, experts, counts, /*keep_hidden=*/false).results;
  });
  return seconds / static_cast<double>(2 * weights_of(experts) * local * rows);
}

double seconds_a_byte(torch::Device device, Communicator& communicator) {
  const int64_t bytes = device.is_cuda() ? 8 << 20 : 256 << 10;  // for each other rank
  const auto options = at::TensorOptions(device).dtype(torch::kByte);
  const auto sent = at::zeros({communicator.size(), bytes}, options);
  const auto received = at::empty_like(sent);
  const std::vector<int64_t> one(communicator.size(), 1);
  const double seconds = seconds_again(communicator, [&] {
    communicator.all_to_all_v({{sent, one, received, one}});
    return received;
  });
  return seconds / static_cast<double>(bytes * (communicator.size() - 1));
}

}  // namespace

Rates nominal_rates(torch::Device device) {
  return device.is_cuda() ? Rates{4e14, 2e11} : Rates{5e10, 1e9};
}

Rates measure_rates(const FeedForward& expert, const ExpertProjections& experts,
                    Communicator& communicator) {
  const torch::NoGradGuard no_grad;
  const auto device = experts.up.weight.device();
  const auto own = at::tensor(
      {seconds_a_flop(expert, experts, communicator), seconds_a_byte(device, communicator)},
      torch::kDouble);
  const auto slowest = std::get<0>(communicator.all_gather(own.to(device)).cpu().max(0));
  const auto* seconds = slowest.const_data_ptr<double>();
  return {1 / seconds[0], 1 / seconds[1]};
}

StepCosts step_costs(const MoEOptions& options, int64_t ranks, const Rates& rates) {
  const auto width =
      static_cast<double>(options.latent_size > 0 ? options.latent_size : options.hidden_size);
  const double inner = static_cast<double>(options.expert_hidden_size) * (options.glu ? 3 : 2);
  const double weights = width * inner;
  const auto element = static_cast<double>(c10::elementSize(options.dtype));
  const auto wide = static_cast<double>(c10::elementSize(at::toOpMathType(options.dtype)));
  const double others = static_cast<double>(ranks - 1) / static_cast<double>(ranks);
  // Forward, dX and dW; x and dy there or y and dx back; a part of the weights to each rank, and of the gradients'
  // sums from each: as much at the owner's link as at a borrower's, one after the other.
  return {3 * 2 * weights / rates.flops, 2 * width * element / rates.bytes,
          weights * (element + wide) * others / rates.bytes};
}

}  // namespace anabranch
