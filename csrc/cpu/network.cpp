// A whole network over tiles of rows, for one capability: a tile passes through all layers, and back, while it is in the
// cache. What is stored for the backward is pre-activations or nothing; a loss makes one pass of both directions.
//
// Per tile, layer by layer (panels as in gemm.h):
//   forward    z = y_before W^T + b, panel by panel, each at once through its map: y, or y and its derivatives J
//   backward   gy = gz_after W_after, panel by panel, each at once times J: gz, its column sums; gw += gz^T y_before
// A LayerNorm comes when all panels of a layer are there: its statistics are those of whole rows.
#include "gemm_bfloat16.h"
#include "tile.h"

namespace fused_inr {
namespace {

// Of the widest layer's columns in a tile: with the weights of a layer it stays in the second-level cache.
constexpr int64_t kTileBytes = 96 << 10;

template <class T>
int64_t in_panels(const NetworkLayer& l) {
  return panels_of<Vector<T>>(l.in_channels, l.in_channel);
}
template <class T>
int64_t z_panels(const NetworkLayer& l) {
  return panels_of<Vector<T>>(l.branches, l.features);
}
template <class T>
int64_t y_panels(const NetworkLayer& l) {
  return panels_of<Vector<T>>(l.outputs, l.features);
}

// Whether a forward stores the layer's z: not that of a last linear layer, which nothing reads again.
bool stores(const Network& n, int i) { return n.layer[i].value || i + 1 < n.layers || n.layer[i].norm; }

// What all layers of a network need at most, in panels or streams of one panel.
template <class T>
struct Extent {
  int64_t widest = 1;  // panels of any tile: inputs, pre-activations, outputs
  int64_t saved = 0;   // panels of the pre-activations that a forward stores
  int branches = 1, outputs = 1, params = 0, derivatives = 0;
  bool expands = false;

  explicit Extent(const Network& n) {
    for (int i = 0; i < n.layers; ++i) {
      const NetworkLayer& l = n.layer[i];
      widest = larger(widest, larger(in_panels<T>(l), larger(z_panels<T>(l), y_panels<T>(l))));
      if (stores(n, i)) saved += z_panels<T>(l);
      branches = branches > l.branches ? branches : l.branches;
      outputs = outputs > l.outputs ? outputs : l.outputs;
      params = params > l.params ? params : l.params;
      const int of_layer = l.outputs * (l.branches + l.params);
      derivatives = derivatives > of_layer ? derivatives : of_layer;
      expands = expands || fused_inr::expands<T>(l.params, l.param_stride);
    }
  }
};

template <class T>
int64_t threads_for(const Network& n) {
  double work = 0;
  for (int i = 0; i < n.layers; ++i) {
    const NetworkLayer& l = n.layer[i];
    work += static_cast<double>(n.rows * l.branches * l.features) *
            static_cast<double>(2 * l.in_channels * l.in_channel + 16);
  }
  return work < kSerialWork ? 1 : n.threads;
}

template <class T>
int64_t rows_of_tile(const Network& n, const Extent<T>& extent) {
  return tile_rows<T>(n.rows, extent.widest * kPanel<Vector<T>>, kTileBytes, n.threads);
}

// The saved tensor begins with the number of rows of its tiles.
constexpr int64_t kSavedHeader = 16;

template <class T>
int64_t saved_elements(const Network& n) {
  return kSavedHeader + n.rows * Extent<T>(n).saved * kPanel<Vector<T>>;
}

// -- weights, packed once a call

template <class T>
struct PackedLayer {
  T *forward = nullptr, *input = nullptr, *bias = nullptr;
  T *gamma = nullptr, *beta = nullptr;  // of a norm, in panels: 1 and 0 where it has none
};

template <class T>
void take_packed(Arena& arena, const Network& n, bool forward, bool input, bool first_input, PackedLayer<T>* packed) {
  constexpr int64_t P = kPanel<Vector<T>>;
  for (int i = 0; i < n.layers; ++i) {
    const NetworkLayer& l = n.layer[i];
    const int64_t depth = l.in_channels * l.in_channel;
    PackedLayer<T> of_layer;
    if (forward) of_layer.forward = arena.take<T>(z_panels<T>(l) * P * depth);
    if (forward && l.bias) of_layer.bias = arena.take<T>(z_panels<T>(l) * P);
    if (input && (i > 0 || first_input)) of_layer.input = arena.take<T>(in_panels<T>(l) * P * l.branches * l.features);
    if (l.norm) {
      of_layer.gamma = arena.take<T>(y_panels<T>(l) * P);
      of_layer.beta = arena.take<T>(y_panels<T>(l) * P);
    }
    if (packed) packed[i] = of_layer;
  }
}

template <class T>
void pack_bias(const NetworkLayer& l, Range panels, T* packed) {
  constexpr int64_t P = kPanel<Vector<T>>;
  const T* bias = static_cast<const T*>(l.bias);
  each_panel<Vector<T>>(l.features, panels.begin, panels.end, [&](int64_t panel, int64_t first, int64_t count) {
    for (int64_t j = 0; j < P; ++j) packed[panel * P + j] = j < count ? bias[first + j] : T(0);
  });
}

template <class T>
void pack_norm(const NetworkLayer& l, T* packed_gamma, T* packed_beta) {
  constexpr int64_t P = kPanel<Vector<T>>;
  const T *gamma = static_cast<const T*>(l.gamma), *beta = static_cast<const T*>(l.beta);
  each_panel<Vector<T>>(l.features, 0, y_panels<T>(l), [&](int64_t panel, int64_t first, int64_t count) {
    for (int64_t j = 0; j < P; ++j) {
      packed_gamma[panel * P + j] = gamma && j < count ? gamma[first + j] : T(1);
      packed_beta[panel * P + j] = beta && j < count ? beta[first + j] : T(0);
    }
  });
}

template <class T>
void pack(const Network& n, const PackedLayer<T>* packed, int64_t parts) {
  using V = Vector<T>;
  double size = 0;
  for (int i = 0; i < n.layers; ++i) {
    const NetworkLayer& l = n.layer[i];
    size += static_cast<double>(l.branches * l.features * l.in_channels * l.in_channel);
  }
  parts = size < 50000 ? 1 : parts;
  run_parts(n.parallel, parts, [&](int64_t part) {
    for (int i = 0; i < n.layers; ++i) {
      const NetworkLayer& l = n.layer[i];
      const int64_t depth = l.in_channels * l.in_channel, columns = l.branches * l.features;
      const T* weight = static_cast<const T*>(l.weight.data);
      if (packed[i].forward) {
        const Range r = share(z_panels<T>(l), part, parts);
        pack_transposed<V>(weight, l.weight.row_stride, depth, l.features, r.begin, r.end, packed[i].forward);
      }
      if (packed[i].input) {
        const Range r = share(in_panels<T>(l), part, parts);
        pack_rows<V>(weight, l.weight.row_stride, columns, l.in_channel, r.begin, r.end, packed[i].input);
      }
      if (packed[i].bias && part == 0) pack_bias<T>(l, {0, z_panels<T>(l)}, packed[i].bias);
      if (packed[i].gamma && part == 0) pack_norm<T>(l, packed[i].gamma, packed[i].beta);
    }
  });
}

// -- one layer of a tile

// z of the panel p of each branch, [branch][m][kPanel] `z_stride` apart
template <class T>
void preactivate(const NetworkLayer& l, const PackedLayer<T>& packed, int64_t m, int64_t p, const T* input, T* z,
                 int64_t z_stride) {
  using V = Vector<T>;
  constexpr int64_t P = kPanel<V>;
  const int64_t depth = l.in_channels * l.in_channel, panels = panels_of<V>(1, l.features);
  for (int b = 0; b < l.branches; ++b)
    product<V, Left::kTile>(m, b * panels + p, b * panels + p + 1, depth, Operand<T>{input, 0, m * P, l.in_channel},
                            packed.forward, depth * P, z + b * z_stride, m * P, packed.bias, false, nullptr);
}

// a map of the panel p: streams z, parameters to out[0 .. outputs)
template <class T>
void apply(void* function, const NetworkLayer& l, int64_t m, int64_t p, const T* z, int64_t z_stride, T* params,
           T* const* out) {
  constexpr int64_t P = kPanel<Vector<T>>;
  const T* in[kMaxStreams];
  int64_t stride[kMaxStreams];
  for (int b = 0; b < l.branches; ++b) {
    in[b] = z + b * z_stride;
    stride[b] = 1;
  }
  const int64_t first = p * P, count = smaller(P, l.features - first);
  param_streams<T>(l.params, l.param, l.param_stride, first, count, m, params, in + l.branches, stride + l.branches);
  reinterpret_cast<Map<T>>(function)(m * P, in, stride, out);
}

// Of a skip connection: the mean square of a sum of two independent terms is that of each.
constexpr double kSkip = 0.70710678118654752440;

// to = (to + x) / sqrt(2), a panel
template <class T>
void add_skip(const T* x, int64_t size, T* to) {
  using V = Vector<T>;
  const V by(kSkip);
  for (int64_t e = 0; e < size; e += V::size) ((V::load(to + e) + V::load(x + e)) * by).store(to + e);
}

bool skips(const Network& n) {
  for (int i = 0; i < n.layers; ++i)
    if (n.layer[i].skip) return true;
  return false;
}

bool norms(const Network& n) {
  for (int i = 0; i < n.layers; ++i)
    if (n.layer[i].norm) return true;
  return false;
}

// Whether the outputs of a tile are made before its cotangents, even where pre-activations are stored.
bool ascends(const Network& n) { return skips(n) || norms(n); }

// -- LayerNorm of a tile's rows

template <class T>
T square_root_of(T x) {
  if constexpr (sizeof(T) == 4)
    return sqrtf(x);
  else
    return ::sqrt(x);
}

// Sums over the columns of rows of the layer's output. f(at, column, sum) adds a vector to each of K sums: `at` from where the
// first row begins in the tile, `column` in panels of one row. What lies beyond a channel's last column does not count, be it a
// NaN.
template <class T>
class RowSums {
  using V = Vector<T>;
  static constexpr int64_t P = kPanel<V>;
  static constexpr int N = Block<V>::vectors;

 public:
  RowSums(const NetworkLayer& l, int64_t panel_size)
      : outputs_(l.outputs), full_(l.features / P), size_(panel_size), rest_(l.features % P != 0) {
    alignas(64) T position[P];
    for (int64_t j = 0; j < P; ++j) position[j] = static_cast<T>(j);
    for (int j = 0; j < N; ++j)
      counts_[j] = V::load(position + j * V::size) < V(static_cast<double>(l.features % P));
  }

  template <int K, class F>
  FI_MEMBER void add(F f, T* result) const {
    V sum[N][K];
    for (int j = 0; j < N; ++j)
      for (int k = 0; k < K; ++k) sum[j][k] = V(0.0);
    int64_t panel = 0;
    for (int c = 0; c < outputs_; ++c) {
      for (const int64_t end = panel + full_; panel < end; ++panel)
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) f(panel * size_ + j * V::size, panel * P + j * V::size, sum[j]);
      if (!rest_) continue;
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) {
        V before[K];
        for (int k = 0; k < K; ++k) before[k] = sum[j][k];
        f(panel * size_ + j * V::size, panel * P + j * V::size, sum[j]);
        for (int k = 0; k < K; ++k) sum[j][k] = select(counts_[j], sum[j][k], before[k]);
      }
      ++panel;
    }
    for (int k = 0; k < K; ++k) {
      for (int j = 1; j < N; ++j) sum[0][k] += sum[j][k];
      alignas(64) T lane[V::size];
      sum[0][k].store(lane);
      for (int w = V::size / 2; w > 0; w /= 2)
        for (int j = 0; j < w; ++j) lane[j] += lane[j + w];
      result[k] = lane[0];
    }
  }

 private:
  int outputs_;
  int64_t full_, size_;
  bool rest_;
  typename V::Mask counts_[N];
};

// R rows at a time, each for itself: sums are chains of dependent steps, and several fill the time in which one waits.
template <class T, int R>
FI_INLINE void normalise_rows(const NetworkLayer& l, const PackedLayer<T>& packed, const RowSums<T>& sums, int64_t size,
                              const T* y, const T* x, T* hat, T* rstd, T* to) {
  using V = Vector<T>;
  constexpr int64_t P = kPanel<V>;
  const T count = static_cast<T>(l.outputs * l.features), eps = static_cast<T>(l.eps);
  T sum[R] = {};
  V mean[R], by[R];
  if (l.centred)
    sums.template add<R>(
        [y](int64_t at, int64_t, V* s) FI_LAMBDA {
          for (int r = 0; r < R; ++r) s[r] += V::load(y + r * P + at);
        },
        sum);
  for (int r = 0; r < R; ++r) mean[r] = V(l.centred ? static_cast<double>(sum[r] / count) : 0.0);
  sums.template add<R>(
      [y, &mean](int64_t at, int64_t, V* s) FI_LAMBDA {
        for (int r = 0; r < R; ++r) {
          const V deviation = V::load(y + r * P + at) - mean[r];
          s[r] = fma(deviation, deviation, s[r]);
        }
      },
      sum);
  for (int r = 0; r < R; ++r) {
    const T scale = T(1) / square_root_of(sum[r] / count + eps);
    if (rstd) rstd[r] = scale;
    by[r] = V(static_cast<double>(scale));
  }
  const V half(kSkip);
  for (int64_t p = 0; p < y_panels<T>(l); ++p)
#pragma GCC unroll 4
    for (int64_t j = 0; j < P; j += V::size) {
      const V gamma = V::load(packed.gamma + p * P + j), beta = V::load(packed.beta + p * P + j);
      for (int r = 0; r < R; ++r) {
        const int64_t at = p * size + r * P + j;
        const V h = (V::load(y + at) - mean[r]) * by[r];
        if (hat) h.store(hat + at);
        V out = fma(h, gamma, beta);
        if (x) out = (out + V::load(x + at)) * half;
        out.store(to + at);
      }
    }
}

// to = gamma * hat + beta of hat = (y - mean) / sqrt(variance + eps), where x is given plus x and over sqrt(2), of m rows. Mean
// first (0 where the norm is not centred: RMSNorm), then squared deviations. hat and 1 / sqrt(..) are kept where they are asked for; y may be hat or to.
template <class T>
void normalise(const NetworkLayer& l, const PackedLayer<T>& packed, int64_t m, const T* y, const T* x, T* hat, T* rstd, T* to) {
  constexpr int64_t P = kPanel<Vector<T>>, R = 4;
  const RowSums<T> sums(l, m * P);
  const auto from = [](auto* p, int64_t at) { return p ? p + at : p; };
  int64_t r = 0;
  for (; r + R <= m; r += R)
    normalise_rows<T, R>(l, packed, sums, m * P, y + r * P, from(x, r * P), from(hat, r * P), from(rstd, r), to + r * P);
  for (; r < m; ++r)
    normalise_rows<T, 1>(l, packed, sums, m * P, y + r * P, from(x, r * P), from(hat, r * P), from(rstd, r), to + r * P);
}

template <class T, int R>
FI_INLINE void normalise_rows_backward(const NetworkLayer& l, const PackedLayer<T>& packed, const RowSums<T>& sums,
                                       int64_t size, const T* hat, const T* rstd, T* g) {
  using V = Vector<T>;
  constexpr int64_t P = kPanel<V>;
  const T count = static_cast<T>(l.outputs * l.features);
  const T* gamma = packed.gamma;
  T sum[2 * R];
  sums.template add<2 * R>(
      [g, hat, gamma](int64_t at, int64_t column, V* s) FI_LAMBDA {
        for (int r = 0; r < R; ++r) {
          const V scaled = V::load(g + r * P + at) * V::load(gamma + column);
          s[2 * r] += scaled;
          s[2 * r + 1] = fma(scaled, V::load(hat + r * P + at), s[2 * r + 1]);
        }
      },
      sum);
  V mean[R], along[R], by[R];
  for (int r = 0; r < R; ++r) {
    mean[r] = V(l.centred ? static_cast<double>(sum[2 * r] / count) : 0.0);
    along[r] = V(static_cast<double>(sum[2 * r + 1] / count));
    by[r] = V(static_cast<double>(rstd[r]));
  }
  for (int64_t p = 0; p < y_panels<T>(l); ++p)
#pragma GCC unroll 4
    for (int64_t j = 0; j < P; j += V::size)
      for (int r = 0; r < R; ++r) {
        const int64_t at = p * size + r * P + j;
        const V centred = fma(V::load(g + at), V::load(gamma + p * P + j), -mean[r]);
        (fnma(V::load(hat + at), along[r], centred) * by[r]).store(g + at);
      }
}

// g, the cotangent of hat * gamma + beta, becomes that of y:
// rstd (g gamma - mean(g gamma) - hat mean(g gamma hat)), means over the columns of a row, the first one 0 where not centred
template <class T>
void normalise_backward(const NetworkLayer& l, const PackedLayer<T>& packed, int64_t m, const T* hat, const T* rstd, T* g) {
  constexpr int64_t P = kPanel<Vector<T>>, R = 2;
  const RowSums<T> sums(l, m * P);
  int64_t r = 0;
  for (; r + R <= m; r += R) normalise_rows_backward<T, R>(l, packed, sums, m * P, hat + r * P, rstd + r, g + r * P);
  for (; r < m; ++r) normalise_rows_backward<T, 1>(l, packed, sums, m * P, hat + r * P, rstd + r, g + r * P);
}

// -- forward

template <class T>
void forward_tile(const NetworkForward& f, const PackedLayer<T>* packed, int64_t row, int64_t m, T* const* buffer, T* z,
                  T* params, T* saved, bool streamed) {
  using V = Vector<T>;
  constexpr int64_t P = kPanel<V>;
  const Network& n = f.network;
  read_rows<T>(n.x, 0, row, m, n.layer[0].in_channels, n.layer[0].in_channel, buffer[0]);
  const T* in = buffer[0];
  T* y = buffer[1];
  for (int i = 0; i < n.layers; ++i) {
    const NetworkLayer& l = n.layer[i];
    const int64_t panels = panels_of<V>(1, l.features);
    T* const stored = saved && stores(n, i) ? saved : nullptr;
    if (stored) saved += z_panels<T>(l) * m * P;
    T* const linear = stored ? stored : y;  // of the identity: its output
    for (int64_t p = 0; p < panels; ++p) {
      if (!l.value) {
        preactivate<T>(l, packed[i], m, p, in, linear + p * m * P, panels * m * P);
        continue;
      }
      T* const to = stored ? stored + p * m * P : z;
      const int64_t stride = (stored ? panels : 1) * m * P;
      preactivate<T>(l, packed[i], m, p, in, to, stride);
      T* out[kMaxStreams];
      for (int c = 0; c < l.outputs; ++c) out[c] = y + (c * panels + p) * m * P;
      apply<T>(l.value, l, m, p, to, stride, params, out);
      for (int c = 0; l.skip && !l.norm && c < l.outputs; ++c) add_skip<T>(in + (c * panels + p) * m * P, m * P, out[c]);
    }
    if (l.norm) {
      normalise<T>(l, packed[i], m, l.value ? y : linear, l.skip ? in : nullptr, nullptr, nullptr, y);
    } else if (!l.value && stored) {
      in = stored;
      continue;
    }
    in = y;
    y = in == buffer[0] ? buffer[1] : buffer[0];
  }
  const NetworkLayer& last = n.layer[n.layers - 1];
  write_rows<T>(f.y, 0, row, m, last.outputs, last.features, in, streamed);
}

#if FI_BFLOAT16
// -- forward with products of bfloat16

struct PackedPairs {
  uint16_t* weight = nullptr;
  PackedLayer<float> other;  // bias, gamma and beta
};

int64_t pair_elements(const NetworkLayer& l) {
  return z_panels<float>(l) * kPanel<Vector<float>> * l.in_channels * 2 * pairs_of(l.in_channel);
}

void pack(const Network& n, const PackedPairs* packed, int64_t parts) {
  using V = Vector<float>;
  run_parts(n.parallel, parts, [&](int64_t part) {
    for (int i = 0; i < n.layers; ++i) {
      const NetworkLayer& l = n.layer[i];
      const Range r = share(z_panels<float>(l), part, parts);
      pack_pairs<V>(static_cast<const float*>(l.weight.data), l.weight.row_stride, l.in_channels, l.in_channel, l.features,
                    r.begin, r.end, packed[i].weight);
      if (packed[i].other.bias) pack_bias<float>(l, r, packed[i].other.bias);
      if (packed[i].other.gamma && part == 0) pack_norm<float>(l, packed[i].other.gamma, packed[i].other.beta);
    }
  });
}

// One thread's memory for a tile: what products read is bfloat16, the rest float32 and, but for what a norm takes, never more
// than a panel of each stream.
struct PairScratch {
  uint16_t* tile[2];
  float *z, *y, *params, *around;
  float* whole;  // a layer's output, where there are norms
};

// As forward_tile; what a layer reads is rounded to bfloat16, pre-activations and maps are float32.
void forward_tile(const NetworkForward& f, const PackedPairs* packed, int64_t row, int64_t m, const PairScratch& s,
                  float* saved) {
  using V = Vector<float>;
  constexpr int64_t P = kPanel<V>;
  const Network& n = f.network;
  uint16_t *in = s.tile[0], *next = s.tile[1];
  const NetworkLayer& first = n.layer[0];
  each_panel<V>(first.in_channel, 0, in_panels<float>(first), [&](int64_t panel, int64_t column, int64_t count) {
    read_panel<float>(n.x, 0, row, m, column, count, s.y);
    narrow_panel<V>(s.y, m, count, in + panel * m * P);
  });
  for (int i = 0; i < n.layers; ++i) {
    const NetworkLayer& l = n.layer[i];
    const int64_t panels = panels_of<V>(1, l.features), depth = l.in_channels * l.in_channel;
    const int64_t of_panel = 2 * P * l.in_channels * pairs_of(l.in_channel);
    float* const stored = saved && stores(n, i) ? saved : nullptr;
    if (stored) saved += z_panels<float>(l) * m * P;
    // an output, float32, to where it is read
    const auto finish = [&](int c, int64_t p, float* out) {
      const int64_t at = (c * panels + p) * m * P, count = smaller(P, l.features - p * P);
      if (l.skip) {
        widen_bfloat16(in + at, s.around, m * P);
        add_skip<float>(s.around, m * P, out);
      }
      if (i + 1 < n.layers)
        narrow_panel<V>(out, m, count, next + at);
      else
        write_panel<float>(f.y, 0, row, m, c * l.features + p * P, count, out, false);
    };
    for (int64_t p = 0; p < panels; ++p) {
      float* const z = stored ? stored + p * m * P : s.z;
      const int64_t stride = (stored ? panels : 1) * m * P;
      for (int b = 0; b < l.branches; ++b) {
        const int64_t panel = b * panels + p;
        pair_product<V>(m, depth, PairOperand{in, m * P, l.in_channel}, packed[i].weight + panel * of_panel, z + b * stride,
                        packed[i].other.bias ? packed[i].other.bias + panel * P : nullptr);
      }
      float* out[kMaxStreams] = {z};
      if (l.value) {
        for (int c = 0; c < l.outputs; ++c) out[c] = l.norm ? s.whole + (c * panels + p) * m * P : s.y + c * m * P;
        apply<float>(l.value, l, m, p, z, stride, s.params, out);
      } else if (l.norm) {
        __builtin_memcpy(s.whole + p * m * P, z, static_cast<size_t>(m * P) * sizeof(float));
      }
      for (int c = 0; !l.norm && c < l.outputs; ++c) finish(c, p, out[c]);
    }
    if (l.norm) {
      normalise<float>(l, packed[i].other, m, s.whole, nullptr, nullptr, nullptr, s.whole);
      for (int c = 0; c < l.outputs; ++c)
        for (int64_t p = 0; p < panels; ++p) finish(c, p, s.whole + (c * panels + p) * m * P);
    }
    uint16_t* const done = in;
    in = next;
    next = done;
  }
}

void network_forward_bfloat16(const NetworkForward& f) {
  constexpr int64_t P = kPanel<Vector<float>>;
  const Network& n = f.network;
  const Extent<float> extent(n);
  const int64_t threads = threads_for<float>(n), tile = rows_of_tile<float>(n, extent), tiles = (n.rows + tile - 1) / tile;
  float* const saved = static_cast<float*>(f.saved);
  if (saved) saved[0] = static_cast<float>(tile);

  const auto take_packed_pairs = [&](Arena& arena) {
    PackedPairs* packed = arena.take<PackedPairs>(n.layers);
    for (int i = 0; i < n.layers; ++i) {
      const NetworkLayer& l = n.layer[i];
      PackedPairs of_layer;
      of_layer.weight = arena.take<uint16_t>(pair_elements(l));
      if (l.bias) of_layer.other.bias = arena.take<float>(z_panels<float>(l) * P);
      if (l.norm) {
        of_layer.other.gamma = arena.take<float>(y_panels<float>(l) * P);
        of_layer.other.beta = arena.take<float>(y_panels<float>(l) * P);
      }
      if (packed) packed[i] = of_layer;
    }
    return packed;
  };
  Arena sizes;
  take_packed_pairs(sizes);
  Arena shared(sizes.used());
  const PackedPairs* const packed = take_packed_pairs(shared);
  pack(n, packed, threads);

  const int64_t panel = tile * P;
  const auto take_scratch = [&](Arena& arena) {
    PairScratch s;
    for (uint16_t*& t : s.tile) t = arena.take<uint16_t>(extent.widest * panel);
    s.z = arena.take<float>(extent.branches * panel);
    s.y = arena.take<float>(extent.outputs * panel);
    s.params = extent.expands ? arena.take<float>(extent.params * panel) : nullptr;
    s.around = arena.take<float>(panel);
    s.whole = norms(n) ? arena.take<float>(extent.widest * panel) : nullptr;
    return s;
  };
  Arena scratch_size;
  take_scratch(scratch_size);
  Queue queue;
  run_parts(n.parallel, smaller(threads, tiles), [&](int64_t) {
    Arena arena(scratch_size.used());
    const PairScratch scratch = take_scratch(arena);
    for (int64_t t; (t = queue.next()) < tiles;) {
      const int64_t row = t * tile, m = smaller(tile, n.rows - row);
      forward_tile(f, packed, row, m, scratch, saved ? saved + kSavedHeader + row * extent.saved * P : nullptr);
    }
  });
}
#endif

template <class T>
void network_forward(const NetworkForward& f) {
  using V = Vector<T>;
  constexpr int64_t P = kPanel<V>;
  const Network& n = f.network;
  if (n.rows == 0) return;
#if FI_BFLOAT16
  if constexpr (sizeof(T) == 4)
    if (n.bfloat16) return network_forward_bfloat16(f);
#endif
  const Extent<T> extent(n);
  const int64_t threads = threads_for<T>(n), tile = rows_of_tile<T>(n, extent), tiles = (n.rows + tile - 1) / tile;
  const int64_t parts = smaller(threads, tiles);
  T* const saved = static_cast<T*>(f.saved);
  if (saved) saved[0] = static_cast<T>(tile);

  Arena sizes;
  take_packed<T>(sizes, n, true, false, false, nullptr);
  sizes.take<PackedLayer<T>>(n.layers);
  Arena shared(sizes.used());
  PackedLayer<T>* packed = shared.take<PackedLayer<T>>(n.layers);
  take_packed<T>(shared, n, true, false, false, packed);
  pack<T>(n, packed, threads);

  const NetworkLayer& last = n.layer[n.layers - 1];
  const bool streamed = streams<T>(f.y, n.rows, last.outputs * last.features);
  const int64_t panel = tile * P;
  Queue queue;
  run_parts(n.parallel, parts, [&](int64_t) {
    Arena arena((2 * extent.widest + extent.branches + extent.params + 1) * panel * static_cast<int64_t>(sizeof(T)) + 512);
    T* const buffer[] = {arena.take<T>(extent.widest * panel), arena.take<T>(extent.widest * panel)};
    T* z = arena.take<T>(extent.branches * panel);
    T* params = extent.expands ? arena.take<T>(extent.params * panel) : nullptr;
    for (int64_t t; (t = queue.next()) < tiles;) {
      const int64_t row = t * tile, m = smaller(tile, n.rows - row);
      T* const of_tile = saved ? saved + kSavedHeader + row * extent.saved * P : nullptr;
      forward_tile<T>(f, packed, row, m, buffer, z, params, of_tile, streamed);
    }
    finish_streams();
  });
}

// -- backward, and one pass with a loss

template <class T>
struct LayerSums {
  T* gw = nullptr;  // as outer_product leaves it
  double *gb = nullptr, *gp = nullptr, *g_gamma = nullptr, *g_beta = nullptr;
};

// One thread's memory for a tile.
template <class T>
struct TrainingScratch {
  T *x, *gz[2], *z, *gy, *derivatives, *params, *target;
  T* around;       // where there are skip connections: the cotangent that passes by a layer
  T* g;            // where there are norms: the cotangent of all of a layer's output
  T** y;           // of each layer
  T** derivative;  // of each layer, streams [output][branch (, parameter)]; null where they are not stored
  T **hat, **rstd;  // of each layer with a norm: the normalised tile (y itself where nothing follows), a number a row

  TrainingScratch(Arena& arena, const NetworkBackward& f, const Extent<T>& extent, int64_t tile) {
    const Network& n = f.network;
    const int64_t panel = tile * kPanel<Vector<T>>;
    y = arena.take<T*>(n.layers);
    derivative = arena.take<T*>(n.layers);
    hat = arena.take<T*>(n.layers);
    rstd = arena.take<T*>(n.layers);
    x = arena.take<T>(in_panels<T>(n.layer[0]) * panel);
    for (int i = 0; i < n.layers; ++i) {
      const NetworkLayer& l = n.layer[i];
      T* const of_layer = arena.take<T>(y_panels<T>(l) * panel);
      const int64_t streams = l.outputs * (l.branches + (l.gp ? l.params : 0));
      T* const of_derivative =
          l.value && (!f.saved || ascends(n)) ? arena.take<T>(streams * panels_of<Vector<T>>(1, l.features) * panel) : nullptr;
      const bool apart = l.norm && (l.gamma || l.beta || l.skip);
      T* const of_hat = apart ? arena.take<T>(y_panels<T>(l) * panel) : of_layer;
      T* const of_rstd = l.norm ? arena.take<T>(tile) : nullptr;
      if (y) {
        y[i] = of_layer;
        derivative[i] = of_derivative;
        hat[i] = of_hat;
        rstd[i] = of_rstd;
      }
    }
    gz[0] = arena.take<T>(extent.widest * panel);
    gz[1] = arena.take<T>(extent.widest * panel);
    z = arena.take<T>(extent.branches * panel);
    gy = arena.take<T>(extent.outputs * panel);
    derivatives = arena.take<T>(extent.derivatives * panel);
    params = extent.expands ? arena.take<T>(extent.params * panel) : nullptr;
    target = arena.take<T>(4 * panel);
    around = skips(n) ? arena.take<T>(extent.widest * panel) : nullptr;
    g = norms(n) ? arena.take<T>(extent.widest * panel) : nullptr;
  }
};

template <class T>
class TrainingTile {
 public:
  TrainingTile(const NetworkBackward& f, const PackedLayer<T>* packed, const TrainingScratch<T>& scratch, LayerSums<T>* sums,
               double* loss)
      : f_(f), n_(f.network), packed_(packed), s_(scratch), sums_(sums), loss_(loss) {}

  void run(int64_t row, int64_t m, const T* saved, bool fresh, bool gx_streamed) {
    row_ = row;
    m_ = m;
    const int last = n_.layers - 1;
    read_rows<T>(n_.x, 0, row, m, n_.layer[0].in_channels, n_.layer[0].in_channel, s_.x);
    // where a layer's output needs more than its own pre-activations of a panel, all outputs are made first
    const bool backwards = saved && !ascends(n_);
    if (!backwards) forward(saved);
    saved_ = backwards ? saved : nullptr;  // of the layers in order; walked from its end
    if (saved_)
      for (int i = 0; i < n_.layers; ++i)
        if (stores(n_, i)) saved_ += z_panels<T>(n_.layer[i]) * m * P;

    T* gz = s_.gz[0];
    T* next = s_.gz[1];
    begin_layer(last);
    through_layer(last, gz, [&](int64_t p) { cotangent(last, p); });
    for (int i = last; i >= 0; --i) {
      const NetworkLayer& l = n_.layer[i];
      const int64_t columns = l.branches * l.features;
      const Operand<T> left{gz, 0, m * P, l.features};
      const T* input = s_.x;
      if (i > 0) {
        const NetworkLayer& before = n_.layer[i - 1];
        const int64_t of_channel = panels_of<V>(1, before.features);
        begin_layer(i - 1);
        const bool plain = before.value && before.branches == 1 && before.outputs == 1 && !before.gp && !before.skip &&
                           !before.norm && !l.skip;
        for (int64_t p = 0; plain && p < of_channel; ++p) {  // gz = gy times the one derivative, on the way out of the product
          jet(i - 1, p);
          T* const to = next + p * m * P;
          product<V, Left::kTile>(m, p, p + 1, columns, left, packed_[i].input, columns * P, to, m * P, nullptr, false,
                                  nullptr, derivative_);
          if (sums_[i - 1].gb)
            add_panel<T>(to, m, smaller(P, before.features - p * P), sums_[i - 1].gb + p * P);
        }
        if (!plain)
          through_layer(i - 1, next, [&](int64_t p) {
            for (int c = 0; c < before.outputs; ++c)
              product<V, Left::kTile>(m, c * of_channel + p, c * of_channel + p + 1, columns, left, packed_[i].input,
                                      columns * P, gy_ + c * gy_stride_, m * P, nullptr, false, nullptr);
            if (l.skip) add_around(i - 1, p);
          });
        input = backwards && !before.value ? saved_ : s_.y[i - 1];  // the identity's z is its output
      } else if (f_.gx.data) {
        product<V, Left::kTile>(m, 0, in_panels<T>(l), columns, left, packed_[i].input, columns * P, next, m * P, nullptr,
                                false, nullptr);
        if (l.skip) add(s_.around, in_panels<T>(l) * m * P, next);
        write_rows<T>(f_.gx, 0, row, m, l.in_channels, l.in_channel, next, gx_streamed);
      }
      if (sums_[i].gw && l.in_channels == 1 && l.in_channel <= kNarrow)
        narrow_outer_product<V>(m, l.features, 0, z_panels<T>(l), gz, m * P, l.in_channel, input, sums_[i].gw, !fresh);
      else if (sums_[i].gw)
        outer_product<V>(m, l.features, columns, 0, z_panels<T>(l), gz, m * P, in_panels<T>(l), input, m * P,
                         sums_[i].gw, !fresh, nullptr);
      T* const done = gz;
      gz = next;
      next = done;
    }
  }

 private:
  using V = Vector<T>;
  static constexpr int64_t P = kPanel<V>;

  static int streams_of(const NetworkLayer& l) { return l.outputs * (l.branches + (l.gp ? l.params : 0)); }

  // gz of layer i from the cotangent of its output, of which `incoming(p)` leaves the panel p of each channel in gy_
  template <class F>
  void through_layer(int i, T* gz, F incoming) {
    const NetworkLayer& l = n_.layer[i];
    const int64_t panels = panels_of<V>(1, l.features), size = m_ * P;
    if (!l.norm) {
      gy_ = s_.gy;
      gy_stride_ = size;
      for (int64_t p = 0; p < panels; ++p) {
        jet(i, p);
        incoming(p);
        if (l.skip) pass_around(i, p);
        combine(i, p, gz);
      }
      return;
    }
    // whole rows before the norm's backward; gz then takes their place where it has as many panels and reads them once
    T* const g = l.branches == 1 && l.outputs == 1 && !l.gp ? gz : s_.g;
    gy_stride_ = panels * size;
    for (int64_t p = 0; p < panels; ++p) {
      gy_ = g + p * size;
      incoming(p);
      if (l.skip) pass_around(i, p);
      add_norm_sums(i, p);
    }
    normalise_backward<T>(l, packed_[i], m_, s_.hat[i], s_.rstd[i], g);
    for (int64_t p = 0; p < panels; ++p) {
      jet(i, p);
      gy_ = g + p * size;
      combine(i, p, gz);
    }
  }

  // of the cotangent g of a norm's output, panel p of each channel: sums over rows of g * hat and of g
  void add_norm_sums(int i, int64_t p) {
    const NetworkLayer& l = n_.layer[i];
    const int64_t panels = panels_of<V>(1, l.features), first = p * P, count = smaller(P, l.features - first);
    for (int c = 0; c < l.outputs; ++c) {
      const T* g = gy_ + c * gy_stride_;
      const int64_t column = c * l.features + first;
      if (sums_[i].g_gamma)
        add_products<T>(g, s_.hat[i] + (c * panels + p) * m_ * P, m_, count, sums_[i].g_gamma + column);
      if (sums_[i].g_beta) add_panel<T>(g, m_, count, sums_[i].g_beta + column);
    }
  }

  // value (before a norm) and derivatives of the panel p
  void apply_jet(int i, int64_t p, const T* z, int64_t z_stride, T* derivative, int64_t derivative_stride) {
    const NetworkLayer& l = n_.layer[i];
    const int64_t panels = panels_of<V>(1, l.features);
    T* out[kMaxStreams];
    for (int c = 0; c < l.outputs; ++c) out[c] = s_.hat[i] + (c * panels + p) * m_ * P;
    for (int d = 0; d < streams_of(l); ++d) out[l.outputs + d] = derivative + d * derivative_stride;
    apply<T>(l.jet, l, m_, p, z, z_stride, s_.params, out);
  }

  // outputs and derivatives of all layers, from the input or from stored pre-activations
  void forward(const T* saved) {
    const T* in = s_.x;
    for (int i = 0; i < n_.layers; ++i) {
      const NetworkLayer& l = n_.layer[i];
      const int64_t panels = panels_of<V>(1, l.features);
      for (int64_t p = 0; p < panels; ++p) {
        const T* stored = saved && stores(n_, i) ? saved + p * m_ * P : nullptr;
        if (!l.value) {
          T* const to = s_.hat[i] + p * m_ * P;
          if (!saved)
            preactivate<T>(l, packed_[i], m_, p, in, to, panels * m_ * P);
          else if (stored)
            for (int b = 0; b < l.branches; ++b)
              __builtin_memcpy(to + b * panels * m_ * P, stored + b * panels * m_ * P, static_cast<size_t>(m_ * P) * sizeof(T));
          continue;
        }
        if (!stored) preactivate<T>(l, packed_[i], m_, p, in, s_.z, m_ * P);
        apply_jet(i, p, stored ? stored : s_.z, (stored ? panels : 1) * m_ * P, s_.derivative[i] + p * m_ * P, panels * m_ * P);
        for (int c = 0; l.skip && !l.norm && c < l.outputs; ++c)
          add_skip<T>(in + (c * panels + p) * m_ * P, m_ * P, s_.y[i] + (c * panels + p) * m_ * P);
      }
      if (l.norm) normalise<T>(l, packed_[i], m_, s_.hat[i], l.skip ? in : nullptr, s_.hat[i], s_.rstd[i], s_.y[i]);
      if (saved && stores(n_, i)) saved += z_panels<T>(l) * m_ * P;
      in = s_.y[i];
    }
  }

  void begin_layer(int i) {
    if (saved_ && stores(n_, i)) saved_ -= z_panels<T>(n_.layer[i]) * m_ * P;
  }

  // y of the panel and its derivatives, from the stored pre-activations or where the forward left them
  void jet(int i, int64_t p) {
    const NetworkLayer& l = n_.layer[i];
    const int64_t panels = panels_of<V>(1, l.features);
    if (!l.value) return;
    if (!saved_) {
      derivative_ = s_.derivative[i] + p * m_ * P;
      derivative_stride_ = panels * m_ * P;
      return;
    }
    derivative_ = s_.derivatives;
    derivative_stride_ = m_ * P;
    apply_jet(i, p, saved_ + p * m_ * P, panels * m_ * P, s_.derivatives, m_ * P);
  }

  // the cotangent of the network's output, into gy_
  void cotangent(int i, int64_t p) {
    const NetworkLayer& l = n_.layer[i];
    const int64_t panels = panels_of<V>(1, l.features), first = p * P, count = smaller(P, l.features - first);
    for (int c = 0; c < l.outputs; ++c) {
      T* gy = gy_ + c * gy_stride_;
      if (!f_.loss.jet) {
        read_panel<T>(f_.g, 0, row_, m_, c * l.features + first, count, gy);
        continue;
      }
      T *target = s_.target, *value = target + m_ * P, *of_target = value + m_ * P;
      read_panel<T>(f_.loss.target, 0, row_, m_, c * l.features + first, count, target);
      const T* in[2 + kMaxParams] = {s_.y[i] + (c * panels + p) * m_ * P, target};
      int64_t stride[2 + kMaxParams] = {1, 1};
      for (int q = 0; q < f_.loss.params; ++q) {
        in[2 + q] = static_cast<const T*>(f_.loss.param[q]);
        stride[2 + q] = 0;
      }
      T* const out[] = {value, gy, of_target};
      reinterpret_cast<Map<T>>(f_.loss.jet)(m_ * P, in, stride, out);
      const T* weight = static_cast<const T*>(f_.loss.row_weight);
      double sum = 0;
      for (int64_t r = 0; r < m_; ++r) {
        const T by = static_cast<T>(f_.loss.scale) * (weight ? weight[row_ + r] : T(1));
        T of_row = 0;
        for (int64_t j = 0; j < count; ++j) of_row += value[r * P + j];
        for (int64_t j = 0; j < P; ++j) gy[r * P + j] *= by;
        sum += static_cast<double>(of_row) * (weight ? static_cast<double>(weight[row_ + r]) : 1.0);
      }
      *loss_ += sum;
    }
  }

  static void add(const T* from, int64_t size, T* to) {
    for (int64_t e = 0; e < size; e += V::size) (V::load(to + e) + V::load(from + e)).store(to + e);
  }

  // gy of the panel p of layer i, which is the input of a layer with a skip connection: what passed by that layer comes in
  void add_around(int i, int64_t p) {
    const NetworkLayer& l = n_.layer[i];
    const int64_t panels = panels_of<V>(1, l.features), size = m_ * P;
    for (int c = 0; c < l.outputs; ++c) add(s_.around + (c * panels + p) * size, size, gy_ + c * gy_stride_);
  }

  // gy of the panel p of layer i, which has a skip connection, becomes that of its map (or norm) and of its input alike
  void pass_around(int i, int64_t p) {
    const NetworkLayer& l = n_.layer[i];
    const int64_t panels = panels_of<V>(1, l.features), size = m_ * P;
    const V by(kSkip);
    for (int c = 0; c < l.outputs; ++c) {
      T *gy = gy_ + c * gy_stride_, *around = s_.around + (c * panels + p) * size;
      for (int64_t e = 0; e < size; e += V::size) {
        const V scaled = V::load(gy + e) * by;
        scaled.store(gy + e);
        scaled.store(around + e);
      }
    }
  }

  // gz of the panel p of each branch, from gy and the derivatives; its column sums
  void combine(int i, int64_t p, T* gz) {
    const NetworkLayer& l = n_.layer[i];
    const int64_t panels = panels_of<V>(1, l.features), first = p * P, count = smaller(P, l.features - first);
    const int64_t size = m_ * P;
    const int each = l.branches + (l.gp ? l.params : 0);
    for (int b = 0; b < l.branches; ++b) {
      T* to = gz + (b * panels + p) * size;
      if (!l.value) {
        if (to != gy_) __builtin_memcpy(to, gy_, static_cast<size_t>(size) * sizeof(T));
      } else {
        multiply(to, size, l.outputs, each, b);
      }
      if (sums_[i].gb) add_panel<T>(to, m_, count, sums_[i].gb + b * l.features + first);
    }
    if (sums_[i].gp)
      for (int q = 0; q < l.params; ++q) {
        multiply(s_.z, size, l.outputs, each, l.branches + q);
        add_panel<T>(s_.z, m_, count, sums_[i].gp + q * l.features + first);
      }
  }

  // to = sum over outputs c of gy_c times the derivative of output c with respect to input `of`; `to` may be gy_ of one output
  void multiply(T* to, int64_t size, int outputs, int each, int of) {
    const T* derivative = derivative_ + of * derivative_stride_;
    for (int64_t e = 0; e < size; e += V::size) (V::load(gy_ + e) * V::load(derivative + e)).store(to + e);
    for (int c = 1; c < outputs; ++c) {
      derivative += each * derivative_stride_;
      const T* gy = gy_ + c * gy_stride_;
      for (int64_t e = 0; e < size; e += V::size)
        fma(V::load(gy + e), V::load(derivative + e), V::load(to + e)).store(to + e);
    }
  }

  const NetworkBackward& f_;
  const Network& n_;
  const PackedLayer<T>* packed_;
  const TrainingScratch<T>& s_;
  LayerSums<T>* sums_;
  double* loss_;
  const T* saved_ = nullptr;
  const T* derivative_ = nullptr;
  T* gy_ = nullptr;  // a panel of the cotangent of a layer's output, channels `gy_stride_` apart
  int64_t row_ = 0, m_ = 0, derivative_stride_ = 0, gy_stride_ = 0;
};

template <class T>
void network_backward(const NetworkBackward& f) {
  using V = Vector<T>;
  constexpr int64_t P = kPanel<V>;
  const Network& n = f.network;
  if (n.rows == 0) return;  // the caller has zeroed the sums
  const Extent<T> extent(n);
  const T* const saved = static_cast<const T*>(f.saved);
  const int64_t tile = saved ? static_cast<int64_t>(saved[0]) : rows_of_tile<T>(n, extent);
  const int64_t tiles = (n.rows + tile - 1) / tile, threads = threads_for<T>(n);

  const auto take_sums = [&](Arena& arena, LayerSums<T>* sums) {
    for (int i = 0; i < n.layers; ++i) {
      const NetworkLayer& l = n.layer[i];
      const int64_t columns = l.branches * l.features;
      LayerSums<T> of_layer;
      if (l.gw) of_layer.gw = arena.take<T>(columns * in_panels<T>(l) * P);
      if (l.gb) of_layer.gb = arena.take<double>(columns);
      if (l.gp) of_layer.gp = arena.take<double>(l.params * l.features);
      if (l.g_gamma) of_layer.g_gamma = arena.take<double>(l.outputs * l.features);
      if (l.g_beta) of_layer.g_beta = arena.take<double>(l.outputs * l.features);
      if (sums) sums[i] = of_layer;
    }
  };
  Arena sums_size;
  take_sums(sums_size, nullptr);
  const int64_t parts = sum_parts(tiles, threads, sums_size.used());
  Arena sizes;
  take_packed<T>(sizes, n, !saved, true, f.gx.data != nullptr, nullptr);
  sizes.take<PackedLayer<T>>(n.layers);
  for (int64_t p = 0; p < parts; ++p) take_sums(sizes, nullptr);
  sizes.take<LayerSums<T>>(parts * n.layers);
  sizes.take<double>(parts);
  sizes.take<const T*>(parts);
  Arena shared(sizes.used());
  PackedLayer<T>* packed = shared.take<PackedLayer<T>>(n.layers);
  take_packed<T>(shared, n, !saved, true, f.gx.data != nullptr, packed);
  LayerSums<T>* sums = shared.take<LayerSums<T>>(parts * n.layers);
  double* loss = shared.take<double>(parts);
  const T** gw = shared.take<const T*>(parts);
  for (int64_t p = 0; p < parts; ++p) take_sums(shared, sums + p * n.layers);
  pack<T>(n, packed, threads);

  Arena scratch_size;
  TrainingScratch<T>(scratch_size, f, extent, tile);
  const bool gx_streamed =
      f.gx.data && streams<T>(f.gx, n.rows, n.layer[0].in_channels * n.layer[0].in_channel);
  Queue queue;
  run_parts(n.parallel, smaller(threads, parts), [&](int64_t) {
    Arena arena(scratch_size.used());
    const TrainingScratch<T> scratch(arena, f, extent, tile);
    for (int64_t part; (part = queue.next()) < parts;) {
      LayerSums<T>* own = sums + part * n.layers;
      for (int i = 0; i < n.layers; ++i) {
        const NetworkLayer& l = n.layer[i];
        for (int64_t j = 0; own[i].gb && j < l.branches * l.features; ++j) own[i].gb[j] = 0;
        for (int64_t j = 0; own[i].gp && j < l.params * l.features; ++j) own[i].gp[j] = 0;
        for (int64_t j = 0; own[i].g_gamma && j < l.outputs * l.features; ++j) own[i].g_gamma[j] = 0;
        for (int64_t j = 0; own[i].g_beta && j < l.outputs * l.features; ++j) own[i].g_beta[j] = 0;
      }
      loss[part] = 0;
      TrainingTile<T> training(f, packed, scratch, own, loss + part);
      const Range range = share(tiles, part, parts);
      for (int64_t t = range.begin; t < range.end; ++t) {
        const int64_t row = t * tile, m = smaller(tile, n.rows - row);
        const T* of_tile = saved ? saved + kSavedHeader + row * extent.saved * P : nullptr;
        training.run(row, m, of_tile, t == range.begin, gx_streamed);
      }
    }
    finish_streams();
  });

  // the parts' sums, in the order of the parts
  for (int i = 0; i < n.layers; ++i) {
    const NetworkLayer& l = n.layer[i];
    const int64_t columns = l.branches * l.features;
    const auto add = [&](double* LayerSums<T>::*member, int64_t count, void* to) {
      for (int64_t j = 0; j < count; ++j) {
        double s = 0;
        for (int64_t p = 0; p < parts; ++p) s += (sums[p * n.layers + i].*member)[j];
        static_cast<T*>(to)[j] = static_cast<T>(s);
      }
    };
    if (l.gb) add(&LayerSums<T>::gb, columns, l.gb);
    if (l.gp) add(&LayerSums<T>::gp, l.params * l.features, l.gp);
    if (l.g_gamma) add(&LayerSums<T>::g_gamma, l.outputs * l.features, l.g_gamma);
    if (l.g_beta) add(&LayerSums<T>::g_beta, l.outputs * l.features, l.g_beta);
    if (l.gw) {
      for (int64_t p = 0; p < parts; ++p) gw[p] = sums[p * n.layers + i].gw;
      add_weight_gradients<T>(n.parallel, threads, columns, l.in_channel, l.in_channels, gw, parts, static_cast<T*>(l.gw));
    }
  }
  if (f.loss.jet) {
    double total = 0;
    for (int64_t p = 0; p < parts; ++p) total += loss[p];
    *f.loss.value = total * f.loss.scale;
  }
}

// -- the floor

template <class T>
void product_floor(double operations, int64_t width, Parallel parallel, int threads) {
  using V = Vector<T>;
  constexpr int64_t P = kPanel<V>;
  const int64_t m = tile_rows<T>(1 << 20, round_up(width, P), kTileBytes, 1), panels = panels_of<V>(1, width);
  // a layer of a tile, as often as it takes; a thread takes the next when it is done
  const int64_t repeats = static_cast<int64_t>(operations / (2.0 * static_cast<double>(m * panels * P * width))) + 1;
  Queue queue;
  run_parts(parallel, smaller(threads, repeats), [&](int64_t) {
    Arena arena((2 * m * panels * P + panels * P * width) * static_cast<int64_t>(sizeof(T)) + 256);
    T* a = arena.take<T>(m * panels * P);
    T* c = arena.take<T>(m * panels * P);
    T* b = arena.take<T>(panels * P * width);
    for (int64_t i = 0; i < m * panels * P; ++i) a[i] = T(0.5);
    for (int64_t i = 0; i < panels * P * width; ++i) b[i] = T(0.25);
    while (queue.next() < repeats)
      product<V, Left::kTile>(m, 0, panels, width, Operand<T>{a, 0, m * P, width}, b, width * P, c, m * P, nullptr, false,
                              nullptr);
  });
}

}  // namespace

#define FI_NETWORK(type)                                                                                             \
  int64_t FI_JOIN(FI_EXPORTED(network_saved), type)(const Network& n) { return saved_elements<type>(n); }            \
  void FI_JOIN(FI_EXPORTED(network_forward), type)(const NetworkForward& f) { network_forward<type>(f); }            \
  void FI_JOIN(FI_EXPORTED(network_backward), type)(const NetworkBackward& f) { network_backward<type>(f); }          \
  void FI_JOIN(FI_EXPORTED(product_floor), type)(double operations, int64_t width, Parallel p, int threads) {         \
    product_floor<type>(operations, width, p, threads);                                                               \
  }
FI_NETWORK(float)
FI_NETWORK(double)
extern const bool FI_EXPORTED(multiplies_bfloat16);
const bool FI_EXPORTED(multiplies_bfloat16) = FI_BFLOAT16;

}  // namespace fused_inr
