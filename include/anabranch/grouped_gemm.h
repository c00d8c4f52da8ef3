#pragma once

#include <anabranch/expert_counts.h>
#include <anabranch/options.h>
#include <torch/types.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace anabranch {

/// What lies between an expert's projections: hidden [P, n] (glu: [P, 2n], gate then up) → [P, n].
struct HiddenActivation {
  Activation activation = Activation::kGeluTanh;
  bool glu = false;
  double limit = 0;   ///< see MoEOptions::activation_limit
  double offset = 0;  ///< see MoEOptions::glu_offset

  /// Whether it is the activation alone, and one that engines compute beside their products.
  bool is_plain() const {
    return limit == 0 && offset == 0 && activation != Activation::kReluSquared &&
           activation != Activation::kQuickGelu;
  }
};

/// P rows of a product: row p is rows[index[p]], or rows[p] where the index is undefined.
struct ProductRows {
  // NOLINTNEXTLINE(google-explicit-constructor): rows are what they are of themselves
  ProductRows(torch::Tensor rows, torch::Tensor index = {})
      : rows(std::move(rows)), index(std::move(index)) {}

  torch::Tensor rows;   ///< [R, width]
  torch::Tensor index;  ///< [P] int64
};

/// Rows of a layer's products that may be read by an index: x of forward, dy of dgrad and wgrad, x of wgrad.
enum class GatheredRows { kForwardX, kBackwardDy, kWgradX };

/// One way to multiply each expert's own rows by its own weight.
///
/// Rows lie expert-major, see ExpertCounts. Counts are exact and may be zero. Tensors are contiguous, of one
/// type and device; outputs are preallocated and every element is written. Accumulation in fp32 (fp64 for
/// fp64). No autograd.
///
/// The public calls check their arguments and throw InputError before anything is computed.
class GroupedGemmEngine {
 public:
  virtual ~GroupedGemmEngine() = default;
  virtual std::string name() const = 0;
  /// Whether it multiplies weights [experts, n, k] of that type.
  virtual bool supports(torch::Dtype dtype, int64_t n, int64_t k) const;
  /// What it chose so far, and why, where it chooses; its name otherwise.
  virtual std::string explain() const;
  /// Whether its choices depend on no clock any more: of all engines but auto, and of auto once it has
  /// settled.
  virtual bool is_settled() const;
  /// What an engine that chooses has chosen, as text for another process; empty of others.
  virtual std::string choices() const;
  /// Takes the choices of such a text, or of an empty one, alone from now on: it measures no more, and what
  /// they lack is chosen as they choose what is nearest to it, or by its shape where nothing is near.
  virtual void settle_on(const std::string& choices);
  /// Whether it reads those rows by their index in a product with weights [experts, n, k] of that type, and sooner than
  /// they are copied. Where it does not read them so at all, each product makes a copy.
  virtual bool gathers(GatheredRows rows, torch::Dtype dtype, int64_t n, int64_t k) const;
  /// Rows of padding that it multiplies besides those of the experts' tokens.
  virtual int64_t padding_rows(const ExpertCounts& counts) const;

  /// y[P, n] = x[P, k] · weight[e]ᵀ, weight [experts, n, k].
  void forward(const ProductRows& x, const torch::Tensor& weight, const ExpertCounts& counts,
               torch::Tensor& y);
  /// dx[P, k] = dy[P, n] · weight[e].
  void dgrad(const torch::Tensor& dy, const torch::Tensor& weight, const ExpertCounts& counts,
             torch::Tensor& dx);
  /// dweight[e] = dy_eᵀ · x_e, [experts, n, k]; zero for an expert without rows.
  void wgrad(const ProductRows& dy, const ProductRows& x, const ExpertCounts& counts,
             torch::Tensor& dweight);
  /// sum[e] += dy_eᵀ · x_e, in fp32 (fp64) whatever the type of the rows; sum [experts, n, k].
  void wgrad_accumulate(const ProductRows& dy, const ProductRows& x, const ExpertCounts& counts,
                        torch::Tensor& sum);

  /// hidden [P, n] = forward(x, weight); returns its activation, [P, n] (glu: [P, n / 2]).
  torch::Tensor forward_activated(const ProductRows& x, const torch::Tensor& weight,
                                  const ExpertCounts& counts, const HiddenActivation& activation,
                                  torch::Tensor& hidden);

  /// Backward of routing_weights · activation(hidden), followed by the projection with `weight`, whose result
  /// has the gradient `dy`.
  struct ActivatedGradient {
    torch::Tensor dhidden;           ///< of hidden's shape; may be hidden itself
    torch::Tensor drouting_weights;  ///< [P] fp32 (fp64)
    torch::Tensor
        activated;  ///< [P, n]: routing_weights · activation(hidden), which the weight's gradient needs
  };
  /// dy [P, h], weight [experts, h, n], hidden [P, n] (glu: [P, 2n]); `routing_weights` [P] fp32 (fp64),
  /// undefined: 1.
  void dgrad_activated(const ProductRows& dy, const torch::Tensor& weight,
                       const ExpertCounts& counts, const HiddenActivation& activation,
                       const torch::Tensor& hidden, const torch::Tensor& routing_weights,
                       ActivatedGradient& gradient);

 protected:
  // Arguments are already checked.

  virtual void do_forward(const torch::Tensor& x, const torch::Tensor& weight,
                          const ExpertCounts& counts, torch::Tensor& y) = 0;
  virtual void do_dgrad(const torch::Tensor& dy, const torch::Tensor& weight,
                        const ExpertCounts& counts, torch::Tensor& dx) = 0;
  virtual void do_wgrad(const torch::Tensor& dy, const torch::Tensor& x, const ExpertCounts& counts,
                        torch::Tensor& dweight) = 0;
  /// Here one product an expert, of rows as wide as the sum.
  virtual void do_wgrad_accumulate(const torch::Tensor& dy, const torch::Tensor& x,
                                   const ExpertCounts& counts, torch::Tensor& sum);

  // With what comes before or after, for engines that do both at once; here in two steps.

  virtual torch::Tensor do_forward_activated(const torch::Tensor& x, const torch::Tensor& weight,
                                             const ExpertCounts& counts,
                                             const HiddenActivation& activation,
                                             torch::Tensor& hidden);
  virtual void do_dgrad_activated(const torch::Tensor& dy, const torch::Tensor& weight,
                                  const ExpertCounts& counts, const HiddenActivation& activation,
                                  const torch::Tensor& hidden, const torch::Tensor& routing_weights,
                                  ActivatedGradient& gradient);

  // Of rows with an index, which one operand of wgrad has at most; here of copies.

  virtual void do_forward_gathering(const ProductRows& x, const torch::Tensor& weight,
                                    const ExpertCounts& counts, torch::Tensor& y);
  virtual void do_wgrad_gathering(const ProductRows& dy, const ProductRows& x,
                                  const ExpertCounts& counts, torch::Tensor& dweight);
  virtual void do_wgrad_accumulate_gathering(const ProductRows& dy, const ProductRows& x,
                                             const ExpertCounts& counts, torch::Tensor& sum);
  virtual torch::Tensor do_forward_activated_gathering(const ProductRows& x,
                                                       const torch::Tensor& weight,
                                                       const ExpertCounts& counts,
                                                       const HiddenActivation& activation,
                                                       torch::Tensor& hidden);
  virtual void do_dgrad_activated_gathering(const ProductRows& dy, const torch::Tensor& weight,
                                            const ExpertCounts& counts,
                                            const HiddenActivation& activation,
                                            const torch::Tensor& hidden,
                                            const torch::Tensor& routing_weights,
                                            ActivatedGradient& gradient);
};

/// The engine of that name for that device: one of `grouped_gemm_engines`, "auto" or "deterministic".
///
/// On a GPU auto measures those it chooses from when it first meets a product (operation, type, sizes, rows
/// and skew by powers of two), which takes a second or two, and milliseconds where it knows a similar one.
/// It keeps the choice in a file in $ANABRANCH_CACHE_DIR, by default the user's cache folder, which
/// processes and hosts may share: the first choice is that of all. It measures nothing while PyTorch is to
/// refuse what is not deterministic. A layer over several ranks takes what its rank 0 has measured before its
/// first step.
///
/// "deterministic" is auto without a clock or a file: it chooses by type, sizes and rows alone.
std::shared_ptr<GroupedGemmEngine> make_grouped_gemm_engine(torch::Device device,
                                                            const std::string& name = "auto");
/// Names of the engines that run on a device.
std::vector<std::string> grouped_gemm_engines(torch::Device device);

// The products into new memory.

/// x [P, k], weight [experts, n, k], Σ counts = P → [P, n].
torch::Tensor grouped_gemm(GroupedGemmEngine& engine, const torch::Tensor& x,
                           const torch::Tensor& weight, const ExpertCounts& counts);
/// dy [P, n], weight [experts, n, k] → [P, k].
torch::Tensor grouped_gemm_dgrad(GroupedGemmEngine& engine, const torch::Tensor& dy,
                                 const torch::Tensor& weight, const ExpertCounts& counts);
/// dy [P, n], x [P, k] → [experts, n, k].
torch::Tensor grouped_gemm_wgrad(GroupedGemmEngine& engine, const torch::Tensor& dy,
                                 const torch::Tensor& x, const ExpertCounts& counts);

}  // namespace anabranch
