// Refusing bad input.
//
// Python checks shapes and dtypes before it calls a registered op, and turns a message of this file into a UserError:
// therefore a message is one sentence for the user, starts with the op's public name and carries no file or line.
#pragma once

#include <sstream>
#include <stdexcept>

namespace unif2ace {

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// check(condition, "route: top_k must be ...", value): the parts are only put together when the condition fails.
template <class... Parts>
inline void check(bool condition, const Parts&... parts) {
  if (!condition) refuse(parts...);
}

}  // namespace unif2ace
