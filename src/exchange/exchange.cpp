#include <anabranch/exchange.h>

#include "exchange/chunks.h"
#include "exchange/moving.h"
#include "support/check.h"
#include "support/sum.h"

namespace anabranch {
namespace {

void check_payload(const Payload& payload, int64_t rows, at::IntArrayRef values, const char* call) {
  check_input(payload.rows.defined(), call, ": rows are undefined");
  check_input(
      payload.rows.dim() == 2 && payload.rows.size(0) == rows && payload.rows.is_contiguous(), call,
      ": rows are ", payload.rows.sizes(),
      payload.rows.is_contiguous() ? "" : " and not contiguous", ", expected a contiguous [", rows,
      ", h] for this plan");
  check_input(!payload.values.defined() || payload.values.sizes() == values, call,
              ": values must be ", values, " for this plan, not ",
              payload.values.defined() ? payload.values.sizes() : at::IntArrayRef());
}

}  // namespace

Payload Exchange::dispatch(const Payload& tokens, const ExchangePlan& plan) const {
  check_payload(tokens, plan.tokens, {plan.tokens, plan.top_k}, "dispatch");
  Dispatching dispatching(*communicator_, tokens, plan, Travel::kInTurn);
  for (size_t chunk = 0; chunk < chunks_of(plan).size(); ++chunk) {
    dispatching.wait_for_next();
  }
  return dispatching.received();
}

Payload Exchange::combine(const Payload& results, const ExchangePlan& plan) const {
  check_payload(results, plan.rows(), {plan.assignments()}, "combine");
  Combining combining(*communicator_, plan, Travel::kInTurn);
  int64_t next = 0;
  const auto chunks = chunks_of(plan);
  for (size_t chunk = 0; chunk < chunks.size(); ++chunk) {
    const auto& of_ranks = chunks[chunk].return_rows;
    const int64_t count = chunks.size() == 1 ? results.rows.size(0) : sum(of_ranks);
    const bool last = chunk + 1 == chunks.size();
    combining.send({results.rows.narrow(0, next, count), last ? results.values : torch::Tensor()});
    next += count;
  }
  return combining.finish();
}

}  // namespace anabranch
