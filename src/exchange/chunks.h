#pragma once

#include <anabranch/exchange.h>

#include <vector>

namespace anabranch {

/// `plan` with its rows in at most `chunks` chunks, each of whole local experts; as it is of a rank alone, and where
/// the host does not know its counts.
///
/// On every rank chunk c holds the experts from chunk_begin(local experts, c, chunks) on. A row goes with
/// the first chunk that has an expert of its token's, so that it still crosses once, and what comes back goes
/// with the last one. Rows sent and received, and rows on their way back, thus lie by (chunk, rank, token);
/// assignments, and the order in which those of a row and the rows of a token are added, are what they were:
/// so are all sums. No communication: both ends know a row's experts. On a GPU the host waits for the counts
/// of each chunk.
ExchangePlan in_chunks(ExchangePlan plan, int64_t chunks, const ExpertPlacement& placement,
                       int64_t rank);

/// The plan's chunks, or the one that a plan is without.
std::vector<ExchangeChunk> chunks_of(const ExchangePlan& plan);

}  // namespace anabranch
