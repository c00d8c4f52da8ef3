#pragma once

#include <anabranch/exchange.h>

#include <vector>

namespace anabranch {

/// `plan` with its rows in so many `chunks`; as it is of a rank alone, and where the host does not know its counts.
///
/// A rank's chunks hold its experts in their order: whole ones (Tutel's pipelining degree, arXiv:2206.03382), or,
/// where there are half as many as chunks or fewer, one from some of the ranks at a time, in pairs that take turns
/// (FasterMoE's smart schedule, doi:10.1145/3503221.3508418): the ranks are blocks of neighbours, and chunk t of an
/// expert of block i holds what block i + t sends it. So a block's own rows come first, and in each chunk every rank
/// sends and receives alike.
///
/// A row goes with the first chunk that has an assignment of its token's, so that it still crosses once, and what
/// comes back goes with the last one. Rows sent and received, and rows on their way back, thus lie by (chunk, rank,
/// token); assignments, and the order in which those of a row and the rows of a token are added, are what they were:
/// so are all sums. No communication: both ends know a row's experts. On a GPU the host waits for the counts
/// of each chunk.
ExchangePlan in_chunks(ExchangePlan plan, int64_t chunks, const ExpertPlacement& placement,
                       int64_t rank);

/// The plan's chunks, or the one that a plan is without.
std::vector<ExchangeChunk> chunks_of(const ExchangePlan& plan);

}  // namespace anabranch
