#pragma once

#include <stdexcept>
#include <string>

namespace bitwright {

/// What the process returns: 0 done, 1 the work failed, 2 the command line or configuration is wrong, 130 interrupted.
enum class ExitStatus : int { done = 0, failed = 1, usage = 2, interrupted = 130 };

/// The parts of `error: WHAT: WHERE: WHY; HOW TO GO ON`. Empty parts are left out.
struct ErrorReport {
  std::string code{};   ///< stable, for programs: "tensor-outside-file"
  std::string what{};   ///< what could not be done: "cannot read model"
  std::string where{};  ///< the file, key or tensor
  std::string why{};    ///< with the numbers that disagree
  std::string fix{};    ///< what the user can do about it
  ExitStatus status = ExitStatus::failed;
  bool resumable = false;  ///< neither the input nor the request is at fault: what is done already stays of use
};

/// Anything the user can cause: bad input, an impossible request, a full disk. Our own bugs are assertions instead.
class Error : public std::runtime_error {
 public:
  explicit Error(const ErrorReport& report);
  const ErrorReport& report() const { return report_; }
  const std::string& code() const { return report_.code; }
  ExitStatus status() const { return report_.status; }
  /// The same error, at `where` if it did not say where.
  Error at(const std::string& where) const;

 private:
  ErrorReport report_;
};

}  // namespace bitwright
