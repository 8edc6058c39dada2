#include "cli/installed.hpp"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>

namespace bitwright {
namespace {

namespace fs = std::filesystem;

std::string variable(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr ? value : "";
}

/// The folders of a list like $PATH; relative ones, the empty one too, are left out: what is there is not installed.
std::vector<fs::path> folders_of(const std::string& list) {
  std::vector<fs::path> folders;
  for (size_t begin = 0; begin < list.size();) {
    const size_t end = std::min(list.find(':', begin), list.size());
    const fs::path folder = list.substr(begin, end - begin);
    if (folder.is_absolute()) folders.push_back(folder.lexically_normal());
    begin = end + 1;
  }
  return folders;
}

void add_folder(std::vector<fs::path>& folders, const fs::path& folder) {
  std::error_code unreadable;
  const bool known = std::ranges::find(folders, folder) != folders.end();
  if (!known && fs::is_directory(folder, unreadable)) folders.push_back(folder);
}

/// PREFIX/lib/python3*/{site,dist}-packages.
void add_python_folders(std::vector<fs::path>& folders, const fs::path& prefix) {
  std::error_code unreadable;
  for (const char* lib : {"lib", "lib64"})
    for (const auto& entry : fs::directory_iterator(prefix / lib, unreadable)) {
      if (!entry.path().filename().string().starts_with("python3")) continue;
      for (const char* packages : {"site-packages", "dist-packages"}) add_folder(folders, entry.path() / packages);
    }
}

/// How names of distributions are compared: "Mlx-LM" and "mlx_lm" are one.
std::string distribution_name(std::string_view name) {
  std::string plain;
  for (const char c : name)
    plain += c == '-' || c == '.' ? '_' : c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  return plain;
}

/// "0.28.0" of vllm-0.28.0.dist-info or torch-1.13.1-py3.11.egg-info beside the package.
std::string version_of(const fs::path& folder, const std::string& package) {
  std::error_code unreadable;
  for (const auto& entry : fs::directory_iterator(folder, unreadable)) {
    const std::string kind = entry.path().extension().string(), name = entry.path().stem().string();
    const size_t dash = name.find('-');
    if ((kind != ".dist-info" && kind != ".egg-info") || dash == std::string::npos) continue;
    if (distribution_name(name.substr(0, dash)) != distribution_name(package)) continue;
    return name.substr(dash + 1, name.find('-', dash + 1) - dash - 1);
  }
  return {};
}

}  // namespace

Installed Installed::here() {
  Installed installed;
  installed.programs_ = folders_of(variable("PATH"));
  installed.libraries_ = folders_of(variable("LD_LIBRARY_PATH"));
  for (const char* folder : {"/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib",
                             "/usr/local/lib", "/usr/local/cuda/lib64", "/opt/rocm/lib"})
    add_folder(installed.libraries_, folder);
  for (const fs::path& folder : folders_of(variable("PYTHONPATH"))) add_folder(installed.python_, folder);
  std::vector<fs::path> prefixes;
  for (const char* name : {"VIRTUAL_ENV", "CONDA_PREFIX"})
    if (const fs::path prefix = variable(name); prefix.is_absolute()) prefixes.push_back(prefix);
  if (const fs::path home = variable("HOME"); home.is_absolute()) prefixes.push_back(home / ".local");
  for (const fs::path& folder : installed.programs_)
    if (folder.filename() == "bin") prefixes.push_back(folder.parent_path());
  for (const char* prefix : {"/usr/local", "/usr"}) prefixes.emplace_back(prefix);
  for (const fs::path& prefix : prefixes) add_python_folders(installed.python_, prefix);
  return installed;
}

std::optional<fs::path> Installed::program(std::string_view name) const {
  std::error_code unreadable;
  for (const fs::path& folder : programs_)
    if (const fs::path file = folder / name; fs::is_regular_file(file, unreadable) && ::access(file.c_str(), X_OK) == 0)
      return file;
  return std::nullopt;
}

std::optional<Installed::Package> Installed::python_package(const std::string& name) const {
  std::error_code unreadable;
  for (const fs::path& folder : python_) {
    const fs::path path = folder / name;
    if (fs::is_directory(path, unreadable) || fs::is_regular_file(fs::path(path) += ".py", unreadable))
      return Package{path, version_of(folder, name)};
  }
  return std::nullopt;
}

std::optional<fs::path> Installed::library(std::string_view name) const {
  std::error_code unreadable;
  for (const fs::path& folder : libraries_)
    if (const fs::path file = folder / name; fs::exists(file, unreadable)) return file;
  return std::nullopt;
}

}  // namespace bitwright
