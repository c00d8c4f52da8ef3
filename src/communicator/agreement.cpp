#include "communicator/agreement.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <anabranch/error.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <utility>

namespace anabranch {
namespace {

using Fields = std::vector<std::pair<std::string, std::string>>;

/// name \0 value \0 name \0 ...; names and values hold no \0.
std::string join(const Fields& fields) {
  std::string text;
  for (const auto& [name, value] : fields) {
    text.append(name).push_back('\0');
    text.append(value).push_back('\0');
  }
  return text;
}

Fields separate(const std::string& text) {
  std::vector<std::string> words;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = text.find('\0', begin);
    words.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  Fields fields;
  for (size_t i = 0; i + 1 < words.size(); i += 2) {
    fields.emplace_back(words[i], words[i + 1]);
  }
  return fields;
}

/// "rank 1: what it threw; rank 3: ..."
std::string all_failures(const std::vector<std::string>& failures) {
  std::string text;
  for (size_t rank = 0; rank < failures.size(); ++rank) {
    if (!failures[rank].empty()) {
      text += c10::str(text.empty() ? "" : "; ", "rank ", rank, ": ", failures[rank]);
    }
  }
  return text;
}

std::vector<int> ranks_of(const std::vector<std::string>& failures) {
  std::vector<int> ranks;
  for (size_t rank = 0; rank < failures.size(); ++rank) {
    if (!failures[rank].empty()) {
      ranks.push_back(static_cast<int>(rank));
    }
  }
  return ranks;
}

std::string names(const Fields& fields) {
  std::string text;
  for (const auto& field : fields) {
    text += (text.empty() ? "" : ", ") + field.first;
  }
  return text;
}

/// What sets `fields` of `rank` apart from rank 0's; empty if nothing does.
std::string difference(int rank, const Fields& fields, const Fields& expected) {
  const bool same_names =
      std::equal(fields.begin(), fields.end(), expected.begin(), expected.end(),
                 [](const auto& left, const auto& right) { return left.first == right.first; });
  if (!same_names) {
    return c10::str("rank ", rank, " has the ", fields.size(), " fields (", names(fields),
                    ") where rank 0 has ", expected.size(), " (", names(expected), ")");
  }
  std::string text;
  for (size_t i = 0; i < fields.size(); ++i) {
    if (fields[i].second != expected[i].second) {
      text += c10::str(text.empty() ? "" : "; ", "rank ", rank, " has ", fields[i].first, " = ",
                       fields[i].second, " where rank 0 has ", expected[i].second);
    }
  }
  return text;
}

}  // namespace

WorkError::WorkError(std::vector<std::string> failures)
    : CommunicationError(all_failures(failures), ranks_of(failures)),
      failures_(std::move(failures)) {}

std::vector<std::string> all_gather_strings(Communicator& communicator, const std::string& text) {
  const auto length = static_cast<int64_t>(text.size());
  const at::Tensor lengths = communicator.all_gather(at::empty({}, at::kLong).fill_(length));
  at::Tensor padded = at::zeros({lengths.max().item<int64_t>()}, at::kByte);
  std::copy(text.begin(), text.end(), padded.mutable_data_ptr<uint8_t>());
  const at::Tensor gathered = communicator.all_gather(padded);

  std::vector<std::string> texts;
  for (int rank = 0; rank < communicator.size(); ++rank) {
    const auto* begin = gathered.const_data_ptr<uint8_t>() + rank * padded.numel();
    texts.emplace_back(begin, begin + lengths[rank].item<int64_t>());
  }
  return texts;
}

void check_agreement(Communicator& communicator, const Fields& fields) {
  const std::vector<std::string> texts = all_gather_strings(communicator, join(fields));
  const Fields expected = separate(texts[0]);
  std::string message;
  std::vector<int> ranks;
  for (int rank = 1; rank < communicator.size(); ++rank) {
    const std::string found = difference(rank, separate(texts[rank]), expected);
    if (!found.empty()) {
      message += (message.empty() ? "" : "; ") + found;
      ranks.push_back(rank);
    }
  }
  if (!ranks.empty()) {
    throw CommunicationError("the ranks do not agree: " + message, std::move(ranks));
  }
}

std::vector<std::string> run_together(Communicator& communicator,
                                      const std::function<void()>& work) {
  std::string failure;
  try {
    work();
  } catch (const std::exception& error) {
    failure = *error.what() == '\0' ? "an exception without a message" : error.what();
  }
  return all_gather_strings(communicator, failure);
}

std::string first_failure(const std::vector<std::string>& failures) {
  for (size_t rank = 0; rank < failures.size(); ++rank) {
    if (!failures[rank].empty()) {
      return c10::str("rank ", rank, ": ", failures[rank]);
    }
  }
  return "";
}

void succeed_together(Communicator& communicator, const std::function<void()>& work) {
  std::vector<std::string> failures = run_together(communicator, work);
  if (!first_failure(failures).empty()) {
    throw WorkError(std::move(failures));
  }
}

}  // namespace anabranch
