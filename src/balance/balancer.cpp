#include "balance/balancer.h"

#include <c10/util/StringUtil.h>

#include <charconv>
#include <iomanip>
#include <sstream>
#include <string_view>

#include "support/check.h"

namespace anabranch {
namespace {

constexpr std::string_view kGathers = "gather:";

/// Of the text behind kGathers; 0 where it is no number above it.
int64_t group_of(const std::string& balance) {
  const auto text = std::string_view(balance).substr(kGathers.size());
  int64_t group = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), group);
  return error == std::errc() && end == text.data() + text.size() && group > 0 ? group : 0;
}

}  // namespace

Balance balance_of(const MoEOptions& options) {
  if (options.balance == "off") return Balance::kOff;
  if (options.balance == "shadow") return Balance::kShadow;
  if (options.balance == "replicas") return Balance::kReplicas;
  if (options.balance == "gather") return Balance::kGather;
  if (options.balance.starts_with(kGathers) && group_of(options.balance) > 0) {
    return Balance::kGather;
  }
  check_input(options.balance == "auto", "MoEOptions: balance = '", options.balance,
              "', expected off, shadow, replicas, gather, gather:N or auto");
  return Balance::kAuto;
}

int64_t gathered_ranks(const MoEOptions& options, int64_t ranks) {
  if (ranks == 1 || !options.balance.starts_with(kGathers)) return ranks;
  const int64_t group = group_of(options.balance);
  check_input(ranks % group == 0, "MoEOptions: balance = '", options.balance, "' with ", ranks,
              " ranks, expected a number that divides them");
  return group;
}

const LoanChoice& Balancer::choose(const torch::Tensor& counts, const FeedForward& expert,
                                   const ExpertProjections& experts, Communicator& communicator) {
  const Balance balance = balance_of(options_);
  if (!rates_.has_value()) {
    rates_ = balance == Balance::kAuto ? measure_rates(expert, experts, communicator)
                                       : nominal_rates(options_.device);
  }
  const auto costs = step_costs(options_, placement_.num_ranks, *rates_);
  switch (balance) {
    case Balance::kShadow:
      choice_ = choose_shadows(counts, placement_, costs);
      break;
    case Balance::kReplicas:
      choice_ = choose_replicas(counts, placement_, costs);
      break;
    case Balance::kGather:
      choice_ = choose_gathered(counts, placement_, costs,
                                gathered_ranks(options_, placement_.num_ranks));
      break;
    default:
      choice_ = choose_cheapest(counts, placement_, costs);
  }
  return *choice_;
}

std::shared_ptr<Lane> Balancer::lane(Communicator& communicator, torch::Device device) {
  if (!device.is_cpu() || communicator.split_order(device) != SplitOrder::kAny) return nullptr;
  if (!lane_) lane_ = std::make_shared<Lane>(communicator);
  return lane_;
}

namespace {

/// "3 to ranks 0, 1; 7 to ranks 2"
std::string described(const std::vector<Loan>& loans) {
  std::string text;
  for (const Loan& loan : loans) {
    text += c10::str(text.empty() ? "" : "; ", loan.expert,
                     loan.borrowers.size() == 1 ? " to rank " : " to ranks ",
                     c10::Join(", ", loan.borrowers));
  }
  return text;
}

}  // namespace

std::string Balancer::explain() const {
  std::ostringstream text;
  text << std::setprecision(3) << "balance = " << options_.balance;
  if (!rates_.has_value() && rounds_ == 0) {
    text << (is_on() ? ": no step yet" : ": tokens travel to their experts");
    return text.str();
  }
  if (choice_.has_value()) {
    const auto& [loans, without, with] = *choice_;
    const bool measured = balance_of(options_) == Balance::kAuto;
    text << ", by " << rates_->flops / 1e9 << " GFLOP/s and " << rates_->bytes / 1e9 << " GB/s"
         << (measured ? " as measured" : " as assumed");
    if (loans.empty()) {
      text << ": tokens travel; the fullest rank computes " << without.fullest_rank
           << " assignments, "
           << (balance_of(options_) == Balance::kReplicas ? "at most 1.05 times the mean"
               : balance_of(options_) == Balance::kGather
                   ? "and no other rank of its group has tokens for them"
                   : "and no weights that travelled would make the step shorter by 5 %")
           << ", foreseen in " << without.seconds * 1e3 << " ms";
    } else {
      text << ": weights of experts travel, " << described(loans) << "; the fullest rank computes "
           << with.fullest_rank << " assignments and not " << without.fullest_rank
           << ", foreseen in " << with.seconds * 1e3 << " ms and not " << without.seconds * 1e3;
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
