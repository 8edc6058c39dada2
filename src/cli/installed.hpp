#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace bitwright {

/// Looks for what is installed by looking at directories alone: nothing that is found is run, loaded or imported.
class Installed {
 public:
  /// Of this process: $PATH, and the Python folders (dist-packages, site-packages) below /usr, /usr/local,
  /// $HOME/.local, $VIRTUAL_ENV, $CONDA_PREFIX and next to each bin of $PATH; $PYTHONPATH.
  static Installed here();

  /// The first executable file of this name on the path.
  std::optional<std::filesystem::path> program(std::string_view name) const;

  struct Package {
    std::filesystem::path path;
    std::string version;  ///< of its .dist-info or .egg-info; empty: there is none
  };
  /// A Python package by the name it is imported by.
  std::optional<Package> python_package(const std::string& name) const;

  /// A shared library ("libcuda.so.1") in the system's folders or those of $LD_LIBRARY_PATH.
  std::optional<std::filesystem::path> library(std::string_view name) const;

  const std::vector<std::filesystem::path>& python_folders() const { return python_; }

 private:
  std::vector<std::filesystem::path> programs_, python_, libraries_;
};

}  // namespace bitwright
