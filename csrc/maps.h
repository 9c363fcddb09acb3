// The activations of a backend by key, and the streams of their maps.
#pragma once

#include <mutex>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "streams.h"

namespace fused_inr {

// How many numbers go into a map and come out of it.
struct Shape {
  int branches = 1, outputs = 1, params = 0;
};

// Activations by key, to which any thread may add.
template <class Activation>
class Registry {
 public:
  Registry() = default;
  explicit Registry(std::unordered_map<std::string, Activation> table) : table_(std::move(table)) {}

  bool find(const std::string& key, Activation* found) const {
    const std::shared_lock lock(mutex_);
    const auto it = table_.find(key);
    if (it == table_.end()) return false;
    *found = it->second;
    return true;
  }
  void put(const std::string& key, const Activation& activation) {
    const std::unique_lock lock(mutex_);
    table_[key] = activation;
  }
  // whether the key was new; else what is there stays
  bool add(const std::string& key, const Activation& activation) {
    const std::unique_lock lock(mutex_);
    return table_.emplace(key, activation).second;
  }

 private:
  mutable std::shared_mutex mutex_;
  std::unordered_map<std::string, Activation> table_;
};

// The groups of a map's inputs and outputs, derived level by level (docs/architecture.md, section 1).
struct Streams {
  struct Kind {
    int width;
    bool param;  // one value a feature; summed over rows where it is an output
  };
  std::vector<Kind> in, out;

  Streams(const Shape& shape, int level, bool learnable) {
    in.push_back({shape.branches, false});
    for (int p = 0; p < shape.params; ++p) in.push_back({1, true});
    out.push_back({shape.outputs, false});
    for (int l = 1; l <= level; ++l) {
      std::vector<Kind> gradients;
      for (size_t i = 0; i < in.size(); ++i) {
        const bool constant = !learnable && i >= 1 && i <= static_cast<size_t>(shape.params);
        if (!constant) gradients.push_back(in[i]);
      }
      in.insert(in.end(), out.begin(), out.end());
      out = gradients;
    }
  }
};

}  // namespace fused_inr
