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

// The groups of the inputs and outputs of a map of some level, which has a slot.
struct Streams {
  struct Kind {
    int width;
    bool param;  // one value a feature; summed over rows where it is an output
  };
  std::vector<Kind> in, out;

  Streams(const Shape& shape, int level, bool learnable)
      : in(groups(kInputs[slot_of(level, learnable)], shape)), out(groups(kResults[slot_of(level, learnable)], shape)) {}

 private:
  static std::vector<Kind> groups(const char* kinds, const Shape& shape) {
    std::vector<Kind> all;
    for (; *kinds; ++kinds) {
      if (*kinds == 'p') {
        all.insert(all.end(), static_cast<size_t>(shape.params), {1, true});
      } else {
        all.push_back({*kinds == 'z' ? shape.branches : shape.outputs, false});
      }
    }
    return all;
  }
};

}  // namespace fused_inr
