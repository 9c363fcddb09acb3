// The backward of a whole network, and one pass of both directions with a loss, for one capability.
#include "norm.h"

namespace fused_inr {
namespace {

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

}  // namespace

#define FI_NETWORK(type) \
  void FI_JOIN(FI_EXPORTED(network_backward), type)(const NetworkBackward& f) { network_backward<type>(f); }
FI_NETWORK(float)
FI_NETWORK(double)

}  // namespace fused_inr
