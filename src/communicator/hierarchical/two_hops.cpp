#include "communicator/hierarchical/two_hops.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>

#include <algorithm>
#include <utility>

#include "communicator/transfer_rows.h"
#include "support/sum.h"

namespace anabranch {
namespace {

/// The same with its rows in order, gathered from where the index says.
Transfer in_order(const Transfer& transfer) {
  if (!transfer.send_index.defined()) {
    return transfer;
  }
  const torch::Tensor send = empty_rows(transfer.send_index.size(0), transfer.send);
  take_sent_rows(transfer, 0, send);
  return {send, transfer.send_rows, transfer.receive, transfer.receive_rows};
}

torch::Tensor join(const std::vector<torch::Tensor>& pieces, const torch::Tensor& like) {
  return pieces.empty() ? empty_rows(0, like) : at::cat(pieces);
}

}  // namespace

TwoHops::TwoHops(std::shared_ptr<Communicator> flat, NodeLayout layout)
    : flat_(std::move(flat)),
      layout_(std::move(layout)),
      mine_(layout_.forwarded_by(flat_->rank())) {
  for (const int member : node()) {
    destinations_.push_back(layout_.forwarded_by(member));
  }
}

/// Only the forwarders do not know how much they will get: their node's ranks tell them. Host to host,
/// who know these numbers: no stream is waited for.
std::vector<TwoHops::Forwarded> TwoHops::exchange_counts(
    const std::vector<Transfer>& transfers) const {
  const auto kinds = static_cast<int64_t>(transfers.size());
  std::vector<int64_t> counts;
  Rows send_rows(flat_->size()), receive_rows(flat_->size());
  for (size_t i = 0; i < node().size(); ++i) {
    for (const Transfer& transfer : transfers) {
      for (const int destination : destinations_[i]) {
        counts.push_back(transfer.send_rows[destination]);
      }
    }
    send_rows[node()[i]] = kinds * static_cast<int64_t>(destinations_[i].size());
    receive_rows[node()[i]] = kinds * static_cast<int64_t>(mine_.size());
  }
  const auto arrived = at::empty({sum(receive_rows)}, at::kLong);
  flat_->all_to_all_v({{at::tensor(counts, at::kLong), send_rows, arrived, receive_rows}});
  const int64_t* next = arrived.const_data_ptr<int64_t>();
  std::vector<Forwarded> forwarded(transfers.size(), Forwarded(node().size()));
  for (size_t i = 0; i < node().size(); ++i) {
    for (auto& of_transfer : forwarded) {
      of_transfer[i].assign(next, next + mine_.size());
      next += mine_.size();
    }
  }
  return forwarded;
}

/// To each rank of the node: the rows for all that it forwards to, by destination.
Transfer TwoHops::first_hop(const Transfer& transfer, const Forwarded& forwarded) const {
  const auto begin = row_offsets(transfer.send_rows);
  Transfer hop;
  hop.send_rows.resize(flat_->size());
  hop.receive_rows.resize(flat_->size());
  std::vector<torch::Tensor> pieces;
  for (size_t i = 0; i < node().size(); ++i) {
    for (const int destination : destinations_[i]) {
      const int64_t rows = transfer.send_rows[destination];
      pieces.push_back(transfer.send.narrow(0, begin[destination], rows));
      hop.send_rows[node()[i]] += rows;
    }
    hop.receive_rows[node()[i]] = sum(forwarded[i]);
  }
  hop.send = join(pieces, transfer.send);
  hop.receive = empty_rows(sum(hop.receive_rows), transfer.receive);
  return hop;
}

/// To each destination on another node: the rows from all ranks of this node, by source.
Transfer TwoHops::second_hop(const Transfer& transfer, const torch::Tensor& arrived,
                             const Forwarded& forwarded) const {
  const int here = layout_.node_of(flat_->rank());
  Transfer hop;
  hop.send_rows.resize(flat_->size());
  hop.receive_rows.resize(flat_->size());
  std::vector<torch::Tensor> pieces;
  for (size_t d = 0; d < mine_.size(); ++d) {
    if (layout_.node_of(mine_[d]) == here) {
      continue;
    }
    int64_t begin = 0;
    for (const Rows& from_member : forwarded) {
      const auto within = row_offsets(from_member);
      pieces.push_back(arrived.narrow(0, begin + within[d], from_member[d]));
      hop.send_rows[mine_[d]] += from_member[d];
      begin += within.back();
    }
  }
  for (int other = 0; other < layout_.nodes(); ++other) {
    if (other == here) {
      continue;
    }
    int64_t& rows = hop.receive_rows[layout_.forwarder(other, flat_->rank())];
    for (const int source : layout_.members(other)) {
      rows += transfer.receive_rows[source];
    }
  }
  hop.send = join(pieces, transfer.send);
  hop.receive = empty_rows(sum(hop.receive_rows), transfer.receive);
  return hop;
}

/// What has come from this node in the first hop, and from the others in the second, by source.
void TwoHops::put_in_order(const Transfer& transfer, const torch::Tensor& from_node,
                           const Forwarded& forwarded, const Transfer& from_others) const {
  std::vector<torch::Tensor> pieces(flat_->size());
  const auto self = std::find(mine_.begin(), mine_.end(), flat_->rank()) - mine_.begin();
  int64_t begin = 0;
  for (size_t i = 0; i < node().size(); ++i) {
    const auto within = row_offsets(forwarded[i]);
    pieces[node()[i]] = from_node.narrow(0, begin + within[self], forwarded[i][self]);
    begin += within.back();
  }
  const auto of_forwarder = row_offsets(from_others.receive_rows);
  for (int other = 0; other < layout_.nodes(); ++other) {
    if (other == layout_.node_of(flat_->rank())) {
      continue;
    }
    int64_t next = of_forwarder[layout_.forwarder(other, flat_->rank())];
    for (const int source : layout_.members(other)) {
      pieces[source] = from_others.receive.narrow(0, next, transfer.receive_rows[source]);
      next += transfer.receive_rows[source];
    }
  }
  torch::Tensor receive = transfer.receive;
  at::cat_out(receive, pieces);
}

/// Rows on their way between nodes.
class TwoHops::SecondHop final : public Pending {
 public:
  SecondHop(const TwoHops& hops, std::vector<Transfer> transfers, std::vector<Forwarded> forwarded,
            std::vector<Transfer> first)
      : hops_(hops),
        transfers_(std::move(transfers)),
        forwarded_(std::move(forwarded)),
        first_(std::move(first)) {
    for (size_t t = 0; t < transfers_.size(); ++t) {
      second_.push_back(hops_.second_hop(transfers_[t], first_[t].receive, forwarded_[t]));
    }
  }

  void start(const StartFlat& start_flat) { pending_ = start_flat(second_); }
  void finish() override {
    pending_->finish();
    for (size_t t = 0; t < transfers_.size(); ++t) {
      hops_.put_in_order(transfers_[t], first_[t].receive, forwarded_[t], second_[t]);
    }
  }
  void run_in_background() override { pending_->run_in_background(); }

 private:
  const TwoHops& hops_;
  std::vector<Transfer> transfers_;
  std::vector<Forwarded> forwarded_;
  std::vector<Transfer> first_;
  std::vector<Transfer> second_;
  std::unique_ptr<Pending> pending_;
};

std::unique_ptr<Pending> TwoHops::start(const std::vector<Transfer>& transfers,
                                        const StartFlat& start_flat) const {
  if (transfers.empty()) {
    return start_flat(transfers);
  }
  auto forwarded = exchange_counts(transfers);
  std::vector<Transfer> first;
  for (size_t t = 0; t < transfers.size(); ++t) {
    first.push_back(first_hop(in_order(transfers[t]), forwarded[t]));
  }
  start_flat(first)->finish();
  auto second =
      std::make_unique<SecondHop>(*this, transfers, std::move(forwarded), std::move(first));
  second->start(start_flat);
  return second;
}

}  // namespace anabranch
