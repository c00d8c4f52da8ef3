#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <anabranch/expert_placement.h>
#include <anabranch/memory_plan.h>
#include <c10/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <iomanip>
#include <sstream>

#include "communicator/peer_memory/layout.h"
#include "experts/parts.h"
#include "gemm/hopper/gather_choice.h"
#include "moe_options.h"
#include "placement/slices.h"
#include "support/check.h"

// The step told once more, of sizes alone: what each stage makes and lets go, in the order of
// moe_layer.cpp, feed_forward.cpp and exchange.cpp. Whoever changes when a large tensor of theirs lives
// changes it here.

namespace anabranch {
namespace {

using Items = std::vector<MemoryPlan::Item>;

/// What is alive, and what was when it was most.
class Ledger {
 public:
  void hold(const std::string& name, int64_t bytes) {
    if (bytes == 0) return;
    alive_.push_back({name, bytes});
    if (const int64_t total = total_bytes(alive_); total > most_) {
      most_ = total;
      fullest_ = alive_;
    }
  }
  void release(const std::string& name) {
    std::erase_if(alive_, [&](const auto& item) { return item.name == name; });
  }
  const Items& alive() const { return alive_; }
  /// And begins anew with what is alive.
  Items take_fullest() {
    most_ = total_bytes(alive_);
    return std::exchange(fullest_, alive_);
  }

 private:
  Items alive_, fullest_;
  int64_t most_ = 0;
};

/// Of a step, what its tensors are made of; bytes where a name says so.
struct Sizes {
  Sizes(const MoEOptions& options, int64_t tokens, int64_t ranks, double load);

  const MoEOptions& options;
  int64_t tokens;       // T
  int64_t ranks;        // W
  int64_t experts;      // of this rank, or slices
  int64_t slices;       // into which an expert is cut at most
  int64_t inner;        // expert_hidden_size, of a slice its width
  int64_t assignments;  // P
  int64_t rows;         // R, and on average as many are sent
  int64_t part;         // rows of P whose backward is in work at a time: of whole experts
  int64_t piece;        // rows of P, of a part, that are multiplied at a time
  int64_t up;           // width of hidden
  int64_t element;      // bytes of a number of the layer's type
  int64_t wide;         // of the router's
  bool staged;          // rows are gathered before they are sent

  int64_t of_tokens(int64_t width) const { return tokens * width * element; }
  int64_t of_rows(int64_t width) const { return rows * width * element; }
  int64_t of_assignments(int64_t width) const { return assignments * width * element; }
  int64_t of_part(int64_t width) const { return part * width * element; }
  /// Whether a kernel of ours multiplies, which reads rows by their index: see TileEngine::supports.
  bool ours() const {
    return options.device.is_cuda() && element == 2 && !options.engine.starts_with("cublas") &&
           up % 8 == 0 && options.hidden_size % 8 == 0 && inner % 8 == 0;
  }
  /// What cuBLAS works in during a product. (Those of cublas_loop's streams stay with the process.)
  int64_t workspace() const {
    return options.device.is_cuda() && !ours() && rows > 0 ? int64_t{32} << 20 : 0;
  }
  int64_t of_piece(int64_t width) const { return piece * width * element; }
  /// So many of those rows, where they are copied to be multiplied.
  int64_t copied(GatheredRows which, int64_t some) const {
    const bool down = which == GatheredRows::kBackwardDy;
    const bool read_in_place =
        ours() && (down ? !options.bias && hopper::gains_by_index(which, options.hidden_size, inner)
                        : hopper::gains_by_index(which, up, options.hidden_size));
    return read_in_place ? 0 : some * options.hidden_size * element;
  }
  int64_t up_weight() const { return experts * up * options.hidden_size * element; }
  int64_t down_weight() const { return experts * options.hidden_size * inner * element; }
  bool has_shared() const { return options.shared_expert_hidden_size > 0; }
  /// Places for a token's experts, of which those that are none hold nothing.
  int64_t slots() const {
    return tokens * slices *
           (options.gate == Gate::kExpertChoice ? options.num_experts : options.top_k);
  }
  int64_t shared_width() const { return options.shared_expert_hidden_size; }
  int64_t shared_up() const { return (options.glu ? 2 : 1) * shared_width(); }
};

/// The chance that a token of evenly spread choices has an expert among `own` of all.
double chance_of_rank(const MoEOptions& options, int64_t own) {
  double none = 1;
  for (int64_t i = 0; i < options.top_k; ++i) {
    none *= std::max(0.0, static_cast<double>(options.num_experts - own - i)) /
            static_cast<double>(options.num_experts - i);
  }
  return 1 - none;
}

/// The rank that holds most of experts; of several that do, the first.
int64_t fullest_rank(const ExpertPlacement& placement, int64_t expert_hidden_size) {
  int64_t fullest = 0, most = -1;
  for (int64_t rank = 0; rank < placement.num_ranks; ++rank) {
    int64_t width = 0;
    for (int64_t local = 0; local < placement.local_experts(rank); ++local) {
      width += slice_width(expert_hidden_size, placement.at(rank, local));
    }
    if (width > most) fullest = rank;
    most = std::max(most, width);
  }
  return fullest;
}

Sizes::Sizes(const MoEOptions& given, int64_t tokens, int64_t ranks, double load)
    : options(given), tokens(tokens), ranks(ranks) {
  const ExpertPlacement placement = placement_of(options, ranks);
  const int64_t rank = fullest_rank(placement, options.expert_hidden_size);
  experts = placement.local_experts(rank);
  slices = placement.most_slices();
  const HeldExpert held = experts > 0 ? placement.at(rank, 0) : HeldExpert();
  inner = slice_width(options.expert_hidden_size, held);
  const bool bounded = ranks > 1 && options.receive_capacity > 0;
  if (bounded) {
    load = options.receive_capacity;
  }
  const auto all = static_cast<double>(tokens * ranks);
  const auto balanced = static_cast<double>(tokens * options.top_k * held.slices);
  assignments =
      std::min(std::lround(load * balanced), tokens * ranks * std::min(options.top_k, experts));
  rows = ranks == 1 ? tokens
         : bounded  ? std::min(assignments, tokens * ranks)
                    : std::min({std::lround(load * all * chance_of_rank(options, experts)),
                                assignments, tokens * ranks});
  const int64_t most = most_parts(options.device, assignments);
  const int64_t parts = std::min(most, std::max<int64_t>(1, experts));
  part = assignments * ((experts + parts - 1) / parts) / std::max<int64_t>(1, experts);
  piece = longest_piece(part, most_pieces(most, experts));
  up = (options.glu ? 2 : 1) * inner;
  element = static_cast<int64_t>(c10::elementSize(options.dtype));
  wide = static_cast<int64_t>(c10::elementSize(at::toOpMathType(options.dtype)));
  staged = ranks > 1 && !(options.device.is_cuda() && ranks <= peer::kMaxRanks);
}

Items parameters_of(const Sizes& z) {
  const auto& o = z.options;
  const int64_t router_bytes = o.num_experts * o.hidden_size * z.wide;
  Items items = {{"router", router_bytes * (o.gate == Gate::kNoisyTopK ? 2 : 1)},
                 {"experts", z.up_weight() + z.down_weight()}};
  if (o.bias) {
    items.push_back({"experts' biases", z.experts * (z.up + o.hidden_size) * z.element});
  }
  if (o.expert_bias) {
    items.push_back({"experts' bias in the router", o.num_experts * z.wide});
  }
  if (z.has_shared()) {
    const int64_t biases = o.bias ? z.shared_up() + o.hidden_size : 0;
    const int64_t gate = o.shared_expert_gate ? o.hidden_size : 0;
    items.push_back(
        {"shared expert",
         ((z.shared_up() + z.shared_width()) * o.hidden_size + biases + gate) * z.element});
  }
  return items;
}

void route(Ledger& memory, const Sizes& z) {
  const auto& o = z.options;
  const int64_t logits = z.tokens * o.num_experts * z.wide;
  const bool in_parts = o.device.is_cuda() && o.dtype == torch::kBFloat16;
  if (z.wide != z.element && !in_parts) {
    memory.hold("router: input in its type", z.tokens * o.hidden_size * z.wide);
  }
  if (in_parts) {
    memory.hold("router: products of parts", 3 * logits);
  }
  memory.hold("router: logits", logits);
  memory.release("router: products of parts");
  if (o.gate == Gate::kNoisyTopK) {
    memory.hold("router: noise", 6 * logits);
  } else {
    memory.release("router: input in its type");
  }
  memory.hold("routing", logits + z.tokens * z.wide + z.slots() / z.slices * (8 + z.wide));
  if (o.gate != Gate::kNoisyTopK) {
    memory.release("router: logits");
  }
}

void plan(Ledger& memory, const Sizes& z) {
  const int64_t slots = z.slots();
  const int64_t numbers = z.ranks == 1 ? 4 * slots + z.tokens
                                       : slots + 2 * z.rows + z.tokens + 3 * z.assignments + z.rows;
  memory.hold("plan: scratch", 8 * slots + (z.ranks == 1 ? 0 : 4 * z.assignments));
  memory.hold("plan", 8 * numbers);
  memory.release("plan: scratch");
}

/// The rows [T, h] of `what` to the experts' ranks.
void dispatch(Ledger& memory, const Sizes& z, const std::string& what, bool with_weights) {
  if (with_weights) {
    memory.hold("routing weights", z.assignments * z.wide);
  }
  if (z.ranks == 1) return;
  memory.hold(what, z.of_rows(z.options.hidden_size));
  if (z.staged) {
    memory.hold("rows gathered to be sent", z.of_rows(z.options.hidden_size));
    memory.release("rows gathered to be sent");
  }
}

/// Sums [R, h] of each row back to their tokens: `what` [T, h]. What they were summed from lives until they
/// set out.
void combine(Ledger& memory, const Sizes& z, const std::string& what, const std::string& from) {
  if (z.ranks > 1) {
    memory.hold("rows that came back", z.of_rows(z.options.hidden_size));
    memory.release(from);
    memory.hold(what, z.of_tokens(z.options.hidden_size));
    memory.release("rows that came back");
  } else {
    memory.hold(what, 0);  // the sums are it
  }
}

void feed_forward(Ledger& memory, const Sizes& z) {
  const int64_t h = z.options.hidden_size;
  memory.hold("engine's workspace", z.workspace());
  if (!z.options.recompute) {
    memory.hold("hidden", z.of_assignments(z.up));
  }
  // Of the last piece: the results are there, unless it is the first as well.
  if (z.piece < z.assignments) {
    memory.hold("results", z.of_assignments(h));
  }
  memory.hold("a piece's rows", z.copied(GatheredRows::kForwardX, z.piece));
  if (z.options.recompute) {
    memory.hold("a piece's hidden", z.of_piece(z.up));
  }
  memory.hold("a piece's activation", z.of_piece(z.inner));
  memory.release("a piece's rows");
  memory.release("a piece's hidden");
  if (z.piece == z.assignments) {
    memory.hold("results", z.of_assignments(h));
  }
  memory.release("a piece's activation");
  memory.release("engine's workspace");
}

void shared_expert(Ledger& memory, const Sizes& z) {
  if (!z.has_shared()) return;
  const int64_t piece = longest_piece(z.tokens, most_parts(z.options.device, z.tokens));
  memory.hold("shared: hidden", z.of_tokens(z.shared_up()));
  memory.hold("shared: activation", piece * z.shared_width() * z.element);
  memory.hold("shared: output", z.of_tokens(z.options.hidden_size));
  memory.release("shared: activation");
}

/// Its output to the experts'.
void add_shared_expert(Ledger& memory, const Sizes& z) {
  if (!z.has_shared()) return;
  if (z.options.shared_expert_gate) {
    memory.hold("shared: gated output", z.of_tokens(z.options.hidden_size));
  }
  memory.hold("sum with the shared expert's", z.of_tokens(z.options.hidden_size));
  memory.release("output");
  memory.release("sum with the shared expert's");
  memory.hold("output", z.of_tokens(z.options.hidden_size));
  memory.release("shared: gated output");
  if (!z.options.shared_expert_gate) {
    memory.release("shared: output");
  }
}

void forward(Ledger& memory, const Sizes& z) {
  route(memory, z);
  plan(memory, z);
  if (z.ranks > 1) {  // while the host waits
    shared_expert(memory, z);
  }
  dispatch(memory, z, "rows received", /*with_weights=*/true);
  feed_forward(memory, z);
  memory.hold(z.ranks > 1 ? "sums of rows" : "output", z.of_rows(z.options.hidden_size));
  combine(memory, z, "output", "results");
  memory.release("results");
  memory.release("sums of rows");
  if (z.ranks == 1) {
    shared_expert(memory, z);
  }
  add_shared_expert(memory, z);
}

void shared_expert_backward(Ledger& memory, const Sizes& z) {
  if (!z.has_shared()) return;
  const int64_t h = z.options.hidden_size;
  if (z.options.shared_expert_gate) {
    memory.hold("shared: gradient of its output", z.of_tokens(h));
    memory.release("shared: output");
    memory.hold("shared: gradients in x", z.of_tokens(h));  // through the gate
  }
  memory.hold("shared: gradient of hidden", z.of_tokens(z.shared_up()));
  memory.hold("shared: activation", z.of_tokens(z.shared_width()));
  memory.hold("gradients", z.shared_width() * h * z.element);
  memory.hold("gradients", z.shared_up() * h * z.element);
  memory.release("shared: activation");
  memory.release("shared: gradients in x");
  memory.hold("shared: gradients in x", z.of_tokens(h) * (z.options.shared_expert_gate ? 2 : 1));
  memory.release("shared: gradient of its output");
  memory.release("shared: gradient of hidden");
  memory.release("shared: hidden");
  memory.release("shared: gradients in x");
  memory.hold("gradient of x, so far", z.of_tokens(h));
}

void feed_forward_backward(Ledger& memory, const Sizes& z) {
  const int64_t h = z.options.hidden_size;
  const bool several = z.part < z.assignments;
  const auto down = [&] {
    if (z.options.recompute) {
      memory.hold("a part's hidden", z.of_part(z.up));
      memory.hold("a piece's rows", z.copied(GatheredRows::kForwardX, z.piece));
      memory.release("a piece's rows");
    }
    memory.hold("a part's gradient", z.copied(GatheredRows::kBackwardDy, z.part));
    memory.hold("a part's activation", z.of_part(z.inner));
  };
  const auto end_of_down = [&] {
    memory.release("a part's gradient");
    memory.release("a part's activation");
  };
  memory.hold("gradient of the weights", z.assignments * z.wide);
  memory.hold("engine's workspace", z.workspace());
  down();
  memory.hold("gradients", z.down_weight());
  end_of_down();
  memory.hold("gradients", z.up_weight());
  memory.hold("a part's rows", z.copied(GatheredRows::kWgradX, z.part));
  memory.release("a part's rows");
  memory.hold("gradient of the experts' rows", z.of_assignments(h));
  if (several) {
    memory.release("a part's hidden");
    down();
    end_of_down();
    memory.hold("a part's rows", z.copied(GatheredRows::kWgradX, z.part));
    memory.release("a part's rows");
  }
  memory.release("a part's hidden");
  memory.release("engine's workspace");
}

void route_backward(Ledger& memory, const Sizes& z) {
  const auto& o = z.options;
  const int64_t logits = z.tokens * o.num_experts * z.wide;
  memory.hold("router: gradient of logits", logits);
  if (o.device.is_cuda() && o.dtype == torch::kBFloat16) {
    memory.hold("router: products of parts", 3 * logits);
  } else if (z.wide != z.element) {
    memory.hold("router: gradient in its type", z.tokens * o.hidden_size * z.wide);
  }
  memory.hold("gradients", o.num_experts * o.hidden_size * z.wide);
  memory.hold("router: gradient of x", z.of_tokens(o.hidden_size));
  memory.release("router: gradient of x");
}

void backward(Ledger& memory, const Sizes& z) {
  shared_expert_backward(memory, z);
  dispatch(memory, z, "gradient's rows received", /*with_weights=*/false);
  feed_forward_backward(memory, z);
  memory.hold(z.ranks > 1 ? "sums of rows" : "gradient of x", z.of_rows(z.options.hidden_size));
  combine(memory, z, "gradient of x", "gradient of the experts' rows");
  for (const char* name :
       {"sums of rows", "gradient of the experts' rows", "rows received", "hidden",
        "gradient's rows received", "routing weights", "gradient of the weights"}) {
    memory.release(name);
  }
  memory.release("gradient of x, so far");  // added where there was one
  route_backward(memory, z);
}

/// Items of one name as one, the largest first.
Items summed(const Items& items) {
  Items sums;
  for (const auto& item : items) {
    const auto known = std::find_if(sums.begin(), sums.end(),
                                    [&](const auto& sum) { return sum.name == item.name; });
    if (known == sums.end()) {
      sums.push_back(item);
    } else {
      known->bytes += item.bytes;
    }
  }
  std::stable_sort(sums.begin(), sums.end(),
                   [](const auto& a, const auto& b) { return a.bytes > b.bytes; });
  return sums;
}

}  // namespace

int64_t total_bytes(const Items& items) {
  int64_t sum = 0;
  for (const auto& item : items) sum += item.bytes;
  return sum;
}

int64_t MemoryPlan::peak() const {
  return total_bytes(parameters) + total_bytes(mailboxes) +
         std::max(total_bytes(forward), total_bytes(backward));
}

std::string MemoryPlan::explain() const {
  std::ostringstream text;
  text << std::fixed << std::setprecision(1);
  const auto line = [&](int indent, const std::string& name, int64_t bytes) {
    text << std::string(indent, ' ') << std::left << std::setw(44 - indent) << name << std::right
         << std::setw(12) << static_cast<double>(bytes) / (1 << 20) << " MiB\n";
  };
  const auto list = [&](const std::string& name, const Items& items) {
    line(0, name, total_bytes(items));
    for (const auto& item : items) line(2, item.name, item.bytes);
  };
  list("parameters", parameters);
  list("kept from forward to backward", saved);
  list("forward's fullest moment", forward);
  list("backward's fullest moment", backward);
  if (!mailboxes.empty()) list("mailboxes", mailboxes);
  line(0, "at most", peak());
  return text.str();
}

MemoryPlan plan_memory(const MoEOptions& options, int64_t tokens, int64_t ranks, double load) {
  checked(options);
  check_input(tokens >= 0, "plan_memory: tokens = ", tokens, ", expected 0 or more");
  check_input(ranks >= 1, "plan_memory: ranks = ", ranks, ", expected at least 1");
  check_input(std::isfinite(load) && load >= 0, "plan_memory: load = ", load,
              ", expected 0 or more");
  const Sizes sizes(options, tokens, ranks, load);
  MemoryPlan result;
  result.parameters = parameters_of(sizes);
  Ledger memory;
  forward(memory, sizes);
  result.saved = summed(memory.alive());
  result.forward = summed(memory.take_fullest());
  backward(memory, sizes);
  result.backward = summed(memory.take_fullest());
  if (ranks > 1 && options.device.is_cuda() && ranks <= peer::kMaxRanks) {
    const auto size = static_cast<int>(ranks);
    result.mailboxes = {{"slots", peer::Layout{size, peer::lanes_for(size)}.bytes()}};
  }
  return result;
}

}  // namespace anabranch
