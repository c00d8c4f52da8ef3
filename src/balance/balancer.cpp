#include "balance/balancer.h"

#include <c10/util/StringUtil.h>

#include <iomanip>
#include <sstream>

#include "support/check.h"

namespace anabranch {

Balance balance_of(const MoEOptions& options) {
  if (options.balance == "off") return Balance::kOff;
  if (options.balance == "shadow") return Balance::kShadow;
  check_input(options.balance == "auto", "MoEOptions: balance = '", options.balance,
              "', expected off, shadow or auto");
  return Balance::kAuto;
}

const ShadowChoice& Balancer::choose(const torch::Tensor& counts, const FeedForward& expert,
                                     const ExpertProjections& experts, Communicator& communicator) {
  if (!rates_.has_value()) {
    rates_ = balance_of(options_) == Balance::kAuto ? measure_rates(expert, experts, communicator)
                                                    : nominal_rates(options_.device);
  }
  choice_ = choose_shadows(counts, placement_, step_costs(options_, placement_.num_ranks, *rates_));
  return *choice_;
}

std::string Balancer::explain() const {
  std::ostringstream text;
  text << std::setprecision(3) << "balance = " << options_.balance;
  if (!rates_.has_value() && rounds_ == 0) {
    text << (is_on() ? ": no step yet" : ": tokens travel to their experts");
    return text.str();
  }
  if (choice_.has_value()) {
    const auto& [experts, without, with] = *choice_;
    const bool measured = balance_of(options_) == Balance::kAuto;
    text << ", by " << rates_->flops / 1e9 << " GFLOP/s and " << rates_->bytes / 1e9 << " GB/s"
         << (measured ? " as measured" : " as assumed");
    if (experts.empty()) {
      text << ": tokens travel; the fullest rank computes " << without.fullest_rank
           << " assignments, and no weights that travelled would make the step of "
           << without.seconds * 1e3 << " ms foreseen shorter by 5 %";
    } else {
      text << ": weights of experts " << c10::Join(", ", experts)
           << " travel; the fullest rank computes " << with.fullest_rank << " assignments and not "
           << without.fullest_rank << ", foreseen in " << with.seconds * 1e3 << " ms and not "
           << without.seconds * 1e3;
    }
  } else {
    text << ": tokens travel to their experts";
  }
  if (rounds_ > 1) {
    text << "; in " << rounds_ << " rounds, as a rank holds " << options_.receive_rows_limit
         << " received rows at most";
  }
  return text.str();
}

}  // namespace anabranch
