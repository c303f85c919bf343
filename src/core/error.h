// Errors inside the library are C++ exceptions that carry a status; the C ABI turns them into a status and a message.
#ifndef FLASHPREFILL_CORE_ERROR_H_
#define FLASHPREFILL_CORE_ERROR_H_

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "flashprefill/flashprefill.h"

namespace flashprefill {

// The text with control characters escaped as in C, so that a message that repeats what a user wrote is one line.
inline std::string OneLine(const std::string& text) {
  constexpr char kHex[] = "0123456789abcdef";
  std::string line;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 && byte != 0x7f) {
      line += c;
    } else if (c == '\n' || c == '\r' || c == '\t') {
      line += c == '\n' ? "\\n" : c == '\r' ? "\\r" : "\\t";
    } else {
      line += {'\\', 'x', kHex[byte >> 4], kHex[byte & 15]};
    }
  }
  return line;
}

class Error : public std::runtime_error {
 public:
  Error(fp_status status, const std::string& message) : std::runtime_error(OneLine(message)), status_(status) {}
  fp_status status() const { return status_; }

 private:
  fp_status status_;
};

// "q_heads is 7; it must be a multiple of kv_heads (2)": the one form of every refusal.
template <typename Value>
[[noreturn]] void Refuse(const std::string& argument, const Value& value, const std::string& must_be,
                         fp_status status = FP_INVALID_ARGUMENT) {
  std::ostringstream message;
  message << argument << " is " << value << "; it must be " << must_be;
  throw Error(status, message.str());
}

// Words in a row, for messages.
inline std::string Joined(const std::vector<std::string>& words, const char* between) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : between) + word;
  return text;
}

} // namespace flashprefill

#endif // FLASHPREFILL_CORE_ERROR_H_
