#include "communicator/mpi/messages.h"

#include <c10/util/StringUtil.h>

#include <algorithm>
#include <utility>

namespace anabranch {

MpiMessages::MpiMessages(MpiRuntime& runtime, Messages messages)
    : runtime_(runtime), messages_(std::move(messages)) {}

MpiMessages::~MpiMessages() {
  if (outstanding_ > 0) {
    runtime_.abandon(std::move(requests_), std::move(messages_));
  }
}

void MpiMessages::receive(int tag, int64_t piece_bytes) {
  post(messages_.incoming, Direction::kIncoming, tag, piece_bytes);
}

void MpiMessages::send(int tag, int64_t piece_bytes) {
  post(messages_.outgoing, Direction::kOutgoing, tag, piece_bytes);
}

void MpiMessages::post(const std::vector<Message>& messages, Direction direction, int tag,
                       int64_t piece_bytes) {
  const std::lock_guard lock(runtime_.mutex());
  for (const Message& message : messages) {
    start(message, direction, tag, piece_bytes);
  }
  indices_.resize(requests_.size());
  statuses_.resize(requests_.size());
}

void MpiMessages::start(const Message& message, Direction direction, int tag, int64_t piece_bytes) {
  for (int64_t offset = 0; offset < message.bytes; offset += piece_bytes) {
    const auto bytes = static_cast<int>(std::min(piece_bytes, message.bytes - offset));
    MPI_Request request = MPI_REQUEST_NULL;
    try {
      if (direction == Direction::kIncoming) {
        ANABRANCH_CHECK_MPI(MPI_Irecv(message.target() + offset, bytes, MPI_BYTE, message.peer, tag,
                                      runtime_.comm(), &request));
      } else {
        ANABRANCH_CHECK_MPI(MPI_Isend(message.source() + offset, bytes, MPI_BYTE, message.peer, tag,
                                      runtime_.comm(), &request));
      }
    } catch (const MpiError& error) {
      throw MpiPeerError(message.peer, error.what());
    }
    pieces_.push_back({message.peer, bytes, direction});
    requests_.push_back(request);
    ++outstanding_;
    sending_ += direction == Direction::kOutgoing ? 1 : 0;
  }
}

bool MpiMessages::poll() {
  if (outstanding_ == 0) {
    return true;
  }
  const std::lock_guard lock(runtime_.mutex());
  int completed = 0;
  const int code = MPI_Testsome(static_cast<int>(requests_.size()), requests_.data(), &completed,
                                indices_.data(), statuses_.data());
  const bool look = code == MPI_ERR_IN_STATUS;  // statuses hold errors only then
  check_mpi(look ? MPI_SUCCESS : code, "MPI_Testsome", __FILE__, __LINE__);
  for (int i = 0; i < completed; ++i) {
    const Piece& piece = pieces_[indices_[i]];
    sending_ -= piece.direction == Direction::kOutgoing ? 1 : 0;
    check_piece(piece, look ? statuses_[i].MPI_ERROR : MPI_SUCCESS, statuses_[i]);
  }
  outstanding_ -= completed;
  return outstanding_ == 0;
}

void MpiMessages::check_piece(const Piece& piece, int result, const MPI_Status& status) const {
  if (result == MPI_ERR_TRUNCATE) {
    throw MpiPeerError(piece.peer, c10::str("more than the expected ", piece.bytes,
                                            " bytes came: the ranks' arguments do not fit"));
  }
  try {
    check_mpi(result, "MPI_Testsome", __FILE__, __LINE__);
  } catch (const MpiError& error) {
    throw MpiPeerError(piece.peer, error.what());
  }
  if (piece.direction == Direction::kIncoming) {
    int bytes = 0;
    ANABRANCH_CHECK_MPI(MPI_Get_count(&status, MPI_BYTE, &bytes));
    if (bytes != piece.bytes) {
      throw MpiPeerError(piece.peer, c10::str(bytes, " bytes came where ", piece.bytes,
                                              " were expected: the ranks' arguments do not fit"));
    }
  }
}

std::vector<int> MpiMessages::pending() const {
  std::vector<int> ranks;
  for (size_t i = 0; i < requests_.size(); ++i) {
    if (requests_[i] != MPI_REQUEST_NULL) {
      ranks.push_back(pieces_[i].peer);
    }
  }
  std::sort(ranks.begin(), ranks.end());
  ranks.erase(std::unique(ranks.begin(), ranks.end()), ranks.end());
  return ranks;
}

}  // namespace anabranch
