#pragma once

#include <anabranch/error.h>

#include <exception>
#include <ostream>
#include <string>
#include <vector>

namespace anabranch::test {

/// What a call threw.
struct Thrown {
  enum class Kind { kNothing, kInput, kCommunication, kOther };
  Kind kind = Kind::kNothing;
  std::string message;
  std::vector<int> peers;  ///< of a CommunicationError

  bool says(const std::string& text) const { return message.find(text) != std::string::npos; }
};

inline std::ostream& operator<<(std::ostream& out, const Thrown& thrown) {
  static const char* const kNames[] = {"nothing", "InputError", "CommunicationError", "other"};
  return out << kNames[static_cast<int>(thrown.kind)] << ": " << thrown.message;
}

template <typename Call>
Thrown thrown_by(const Call& call) {
  try {
    call();
    return {};
  } catch (const InputError& error) {
    return {Thrown::Kind::kInput, error.what(), {}};
  } catch (const CommunicationError& error) {
    return {Thrown::Kind::kCommunication, error.what(), error.peers()};
  } catch (const std::exception& error) {
    return {Thrown::Kind::kOther, error.what(), {}};
  }
}

}  // namespace anabranch::test

/// The call throws an InputError whose message holds `text`.
#define EXPECT_INPUT_ERROR(call, text)                                                       \
  do {                                                                                       \
    const auto thrown_here = ::anabranch::test::thrown_by([&] { static_cast<void>(call); }); \
    EXPECT_TRUE(thrown_here.kind == ::anabranch::test::Thrown::Kind::kInput &&               \
                thrown_here.says(text))                                                      \
        << #call << "\n  expected an InputError that says \"" << (text) << "\"\n  got "      \
        << thrown_here;                                                                      \
  } while (false)
