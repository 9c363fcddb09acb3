// linear_act and act_map over tiles of rows, for one capability. A tile goes through all its steps while it is in the
// cache; what reaches memory is what the caller asked for.
#include "tile.h"

namespace fused_inr {
namespace {

int64_t parts_for(const Layer& l) {
  const double columns = static_cast<double>(l.branches * l.features);
  const double work = static_cast<double>(l.batch * l.rows) * columns * static_cast<double>(2 * l.in_features + 16);
  return work < kSerialWork ? 1 : l.threads;
}

// -- shared pieces of a layer

template <class T>
const T* weight_of(const Layer& l, int64_t g) {
  return address<T>(l.weight, g, 0);
}

template <class T>
int64_t z_panels(const Layer& l) {
  return panels_of<Vector<T>>(l.branches, l.features);
}

template <class T>
void pad_bias(const Layer& l, int64_t g, T* padded) {
  constexpr int64_t P = kPanel<Vector<T>>;
  const T* bias = static_cast<const T*>(l.bias) + g * l.bias_batch_stride;
  each_panel<Vector<T>>(l.features, 0, z_panels<T>(l), [&](int64_t panel, int64_t first, int64_t count) {
    for (int64_t j = 0; j < P; ++j) padded[panel * P + j] = j < count ? bias[first + j] : T(0);
  });
}

// f(first panel, end) by several threads where it is worth it
template <class F>
void pack_by(const Layer& l, int64_t panels, int64_t parts, F f) {
  parts = l.branches * l.features * l.in_features < 100000 ? 1 : smaller(parts, panels);
  run_parts(l.parallel, parts, [&](int64_t part) {
    const Range r = share(panels, part, parts);
    f(r.begin, r.end);
  });
}

// W^T for z = x W^T, in panels of z's columns
template <class T>
void pack_for_forward(const Layer& l, int64_t g, int64_t parts, T* packed) {
  pack_by(l, z_panels<T>(l), parts, [&](int64_t begin, int64_t end) {
    pack_transposed<Vector<T>>(weight_of<T>(l, g), l.weight.row_stride, l.in_features, l.features, begin, end, packed);
  });
}

// W for gx = gz W, in panels of x's columns
template <class T>
void pack_for_input(const Layer& l, int64_t g, int64_t parts, T* packed) {
  pack_by(l, panels_of<Vector<T>>(1, l.in_features), parts, [&](int64_t begin, int64_t end) {
    pack_rows<Vector<T>>(weight_of<T>(l, g), l.weight.row_stride, l.branches * l.features, l.in_features, begin, end,
                         packed);
  });
}

// -- forward

constexpr int64_t kForwardBytes = 128 << 10;  // of a tile's x, which all panels of the weight meet
constexpr int64_t kBackwardBytes = 96 << 10;  // of a block of a tile's gz
constexpr int64_t kBackwardColumns = 256;     // of such a block

template <class T>
struct ForwardScratch {
  T *x, *z, *y, *params;
  ForwardScratch(Arena& arena, const Forward& f, int64_t rows) {
    const Layer& l = f.layer;
    constexpr int64_t P = kPanel<Vector<T>>;
    x = l.x.storage == kStorage<T> ? nullptr : arena.take<T>(rows * l.in_features);
    z = arena.take<T>(l.branches * rows * P);
    y = arena.take<T>(l.outputs * rows * P);
    params = expands<T>(l.params, l.param_stride) ? arena.take<T>(l.params * rows * P) : nullptr;
  }
};

template <class T>
void forward_rows(const Forward& f, int64_t g, Queue& queue, int64_t tile, const T* packed, const T* bias,
                  const ForwardScratch<T>& scratch) {
  using V = Vector<T>;
  constexpr int64_t P = kPanel<V>;
  const Layer& l = f.layer;
  const auto map = reinterpret_cast<Map<T>>(l.map);
  const int64_t panels = panels_of<V>(1, l.features);
  const bool y_streamed = streams<T>(f.y, l.batch * l.rows, l.outputs * l.features);
  const bool z_streamed = f.z.data && streams<T>(f.z, l.batch * l.rows, l.branches * l.features);
  const int64_t tiles = (l.rows + tile - 1) / tile;
  for (int64_t next, t = queue.next(); t < tiles; t = next) {
    const int64_t row = t * tile, m = smaller(tile, l.rows - row);
    next = queue.next();
    const Tile<T> x = read_tile<T>(l.x, g, row, m, l.in_features, scratch.x);
    const Operand<T> left{x.data, x.stride};
    Ahead ahead;
    if (next < tiles) fetch_rows<T>(ahead, l.x, g, next * tile, smaller(tile, l.rows - next * tile), 0, l.in_features);
    ahead.spread(panels * l.branches * blocks_of<V>(m));
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t first = p * P, count = smaller(P, l.features - first);
      const T* in[kMaxStreams];
      T* out[kMaxStreams];
      int64_t stride[kMaxStreams];
      for (int b = 0; b < l.branches; ++b) {
        T* z = scratch.z + b * m * P;
        product<V, Left::kRows>(m, b * panels + p, b * panels + p + 1, l.in_features, left, packed, l.in_features * P, z,
                                m * P, bias, false, &ahead);
        if (f.z.data) write_panel<T>(f.z, g, row, m, b * l.features + first, count, z, z_streamed);
        in[b] = z;
        stride[b] = 1;
      }
      param_streams<T>(l.params, l.param, l.param_stride, first, count, m, scratch.params, in + l.branches,
                       stride + l.branches);
      for (int c = 0; c < l.outputs; ++c) out[c] = scratch.y + c * m * P;
      map(m * P, in, stride, out);
      for (int c = 0; c < l.outputs; ++c) write_panel<T>(f.y, g, row, m, c * l.features + first, count, out[c], y_streamed);
    }
  }
  finish_streams();
}

template <class T>
void forward(const Forward& f) {
  using V = Vector<T>;
  constexpr int64_t P = kPanel<V>;
  const Layer& l = f.layer;
  if (l.batch * l.rows * l.features == 0) return;
  const int64_t threads = parts_for(l);
  const bool by_batch = l.batch > 1 && l.batch >= threads;  // a layer a thread, else a layer by all threads
  const int64_t tile = tile_rows<T>(l.rows, l.in_features, kForwardBytes, by_batch ? 1 : threads);
  const int64_t tiles = (l.rows + tile - 1) / tile;
  const int64_t weight_size = z_panels<T>(l) * P * l.in_features, bias_size = z_panels<T>(l) * P;

  Arena sizes;
  ForwardScratch<T>(sizes, f, tile);
  sizes.take<T>(weight_size);
  sizes.take<T>(bias_size);

  if (by_batch) {
    run_parts(l.parallel, threads, [&](int64_t part) {
      Arena arena(sizes.used());
      const ForwardScratch<T> scratch(arena, f, tile);
      T* packed = arena.take<T>(weight_size);
      T* bias = l.bias ? arena.take<T>(bias_size) : nullptr;
      const Range batch = share(l.batch, part, threads);
      for (int64_t g = batch.begin; g < batch.end; ++g) {
        if (g == batch.begin || l.weight.batch_stride != 0) pack_for_forward<T>(l, g, 1, packed);
        if (bias) pad_bias<T>(l, g, bias);
        Queue queue;
        forward_rows<T>(f, g, queue, tile, packed, bias, scratch);
      }
    });
    return;
  }
  Arena shared((weight_size + bias_size) * static_cast<int64_t>(sizeof(T)) + 128);
  T* packed = shared.take<T>(weight_size);
  T* bias = l.bias ? shared.take<T>(bias_size) : nullptr;
  const int64_t parts = smaller(threads, tiles);
  for (int64_t g = 0; g < l.batch; ++g) {
    pack_for_forward<T>(l, g, parts, packed);
    if (bias) pad_bias<T>(l, g, bias);
    Queue queue;
    run_parts(l.parallel, parts, [&](int64_t) {
      Arena arena(sizes.used());
      const ForwardScratch<T> scratch(arena, f, tile);
      forward_rows<T>(f, g, queue, tile, packed, bias, scratch);
    });
  }
}

// -- backward

// panels of one branch that make a block of gz
template <class T>
int64_t block_panels(const Layer& l) {
  constexpr int64_t P = kPanel<Vector<T>>;
  return larger(1, smaller(panels_of<Vector<T>>(1, l.features), kBackwardColumns / (P * l.branches)));
}

template <class T>
struct BackwardScratch {
  T *x, *g, *z, *gz, *gx, *gp, *params;
  BackwardScratch(Arena& arena, const Backward& f, int64_t rows) {
    const Layer& l = f.layer;
    constexpr int64_t P = kPanel<Vector<T>>;
    const int64_t x_size = panels_of<Vector<T>>(1, l.in_features) * P * rows;
    x = f.gw || !f.z.data ? arena.take<T>(x_size) : nullptr;
    g = arena.take<T>(l.outputs * rows * P);
    z = arena.take<T>(l.branches * rows * P);
    gz = arena.take<T>(block_panels<T>(l) * l.branches * rows * P);
    gx = f.gx.data ? arena.take<T>(x_size) : nullptr;
    gp = f.gp ? arena.take<T>(l.params * rows * P) : nullptr;
    params = expands<T>(l.params, l.param_stride) ? arena.take<T>(l.params * rows * P) : nullptr;
  }
};

// What the rows of one part add up to.
template <class T>
struct Sums {
  T* gw = nullptr;  // as outer_product leaves it
  double *gb = nullptr, *gp = nullptr;
  bool fresh = true;
};

template <class T>
struct Packed {
  const T *forward, *input, *bias;
};

// gz of the panels p .. of each branch of a tile, with its column sums
template <class T>
void gradient_panels(const Backward& f, int64_t g, int64_t row, int64_t m, int64_t begin, int64_t end, Packed<T> packed,
                     const BackwardScratch<T>& scratch, Sums<T>& sums) {
  using V = Vector<T>;
  constexpr int64_t P = kPanel<V>;
  const Layer& l = f.layer;
  const auto map = reinterpret_cast<Map<T>>(l.map);
  const int64_t panels = panels_of<V>(1, l.features);
  for (int64_t p = begin; p < end; ++p) {
    const int64_t first = p * P, count = smaller(P, l.features - first);
    const T* in[kMaxStreams];
    T* out[kMaxStreams];
    int64_t stride[kMaxStreams];
    int inputs = 0, outputs = 0;
    for (int b = 0; b < l.branches; ++b) {
      T* z = scratch.z + b * m * P;
      if (f.z.data) {
        read_panel<T>(f.z, g, row, m, b * l.features + first, count, z);
      } else {
        product<V, Left::kTile>(m, b * panels + p, b * panels + p + 1, l.in_features,
                                Operand<T>{scratch.x, 0, m * P, l.in_features}, packed.forward, l.in_features * P, z,
                                m * P, packed.bias, false, nullptr);
      }
      stride[inputs] = 1;
      in[inputs++] = z;
      out[outputs++] = scratch.gz + (b * (end - begin) + p - begin) * m * P;
    }
    inputs += param_streams<T>(l.params, l.param, l.param_stride, first, count, m, scratch.params, in + inputs,
                               stride + inputs);
    for (int c = 0; c < l.outputs; ++c) {
      T* cotangent = scratch.g + c * m * P;
      read_panel<T>(f.g, g, row, m, c * l.features + first, count, cotangent);
      stride[inputs] = 1;
      in[inputs++] = cotangent;
    }
    if (f.gp)
      for (int q = 0; q < l.params; ++q) out[outputs++] = scratch.gp + q * m * P;
    map(m * P, in, stride, out);
    if (sums.gb)
      for (int b = 0; b < l.branches; ++b) add_panel<T>(out[b], m, count, sums.gb + b * l.features + first);
    if (sums.gp)
      for (int q = 0; q < l.params; ++q)
        add_panel<T>(scratch.gp + q * m * P, m, count, sums.gp + q * l.features + first);
  }
}

template <class T>
void backward_rows(const Backward& f, int64_t g, Range tiles, int64_t tile, Packed<T> packed,
                   const BackwardScratch<T>& scratch, Sums<T>& sums) {
  using V = Vector<T>;
  constexpr int64_t P = kPanel<V>;
  const Layer& l = f.layer;
  const int64_t columns = l.branches * l.features, depth = l.in_features;
  const int64_t panels = panels_of<V>(1, l.features), x_panels = panels_of<V>(1, depth), block = block_panels<T>(l);
  const bool gx_streamed = f.gx.data && streams<T>(f.gx, l.batch * l.rows, depth);
  for (int64_t t = tiles.begin; t < tiles.end; ++t) {
    const int64_t row = t * tile, m = smaller(tile, l.rows - row);
    if (scratch.x) read_rows<T>(l.x, g, row, m, 1, depth, scratch.x);
    for (int64_t begin = 0; begin < panels; begin += block) {
      const int64_t end = smaller(panels, begin + block), width = end - begin;
      gradient_panels<T>(f, g, row, m, begin, end, packed, scratch, sums);

      // what the next block will read
      Ahead ahead;
      const bool last = end == panels;
      if (!last || t + 1 < tiles.end) {
        const int64_t next = last ? row + tile : row, rows = smaller(tile, l.rows - next);
        const int64_t first = last ? 0 : end * P, count = smaller(l.features - first, block * P);
        for (int b = 0; f.z.data && b < l.branches; ++b)
          fetch_rows<T>(ahead, f.z, g, next, rows, b * l.features + first, count);
        for (int c = 0; c < l.outputs; ++c) fetch_rows<T>(ahead, f.g, g, next, rows, c * l.features + first, count);
        if (last && scratch.x) fetch_rows<T>(ahead, l.x, g, next, rows, 0, depth);
      }
      ahead.spread((f.gx.data ? l.branches * x_panels * blocks_of<V>(m) : 0) +
                   (sums.gw ? l.branches * x_panels * width : 0));

      const int64_t valid = smaller(l.features, end * P) - begin * P;
      for (int b = 0; b < l.branches; ++b) {
        const T* gz = scratch.gz + b * width * m * P;
        if (f.gx.data)
          product<V, Left::kTile>(m, 0, x_panels, valid, Operand<T>{gz, 0, m * P, valid},
                                  packed.input + (b * l.features + begin * P) * P, columns * P, scratch.gx, m * P, nullptr,
                                  begin + b > 0, &ahead);
        if (sums.gw)
          outer_product<V>(m, l.features, columns, begin, end, gz, m * P, x_panels, scratch.x, m * P,
                           sums.gw + b * l.features * P, !sums.fresh, &ahead);
      }
    }
    if (f.gx.data) write_rows<T>(f.gx, g, row, m, 1, depth, scratch.gx, gx_streamed);
    sums.fresh = false;
  }
  finish_streams();
}

template <class T>
void backward(const Backward& f) {
  using V = Vector<T>;
  constexpr int64_t P = kPanel<V>;
  const Layer& l = f.layer;
  const int64_t columns = l.branches * l.features, depth = l.in_features;
  if (l.batch * l.rows * columns == 0) return;  // the caller has zeroed the sums
  const int64_t threads = parts_for(l);
  const bool by_batch = l.batch > 1 && l.batch >= threads;
  const int64_t width = larger(block_panels<T>(l) * P * l.branches, panels_of<V>(1, depth) * P);
  const int64_t tile = tile_rows<T>(l.rows, width, kBackwardBytes, by_batch ? 1 : threads);
  const int64_t tiles = (l.rows + tile - 1) / tile;
  const int64_t forward_size = f.z.data ? 0 : z_panels<T>(l) * P * depth, bias_size = z_panels<T>(l) * P;
  const int64_t x_columns = panels_of<V>(1, depth) * P;
  const int64_t input_size = f.gx.data ? x_columns * columns : 0;
  const int64_t param_size = l.params * l.features;

  const auto take_packed = [&](Arena& arena) {
    T* forward = arena.take<T>(forward_size);
    T* input = arena.take<T>(input_size);
    T* bias = arena.take<T>(bias_size);
    return Packed<T>{forward, input, l.bias ? bias : nullptr};
  };
  const auto pack = [&](const Packed<T>& to, int64_t g, int64_t by) {
    if (!f.z.data) {
      pack_for_forward<T>(l, g, by, const_cast<T*>(to.forward));
      if (l.bias) pad_bias<T>(l, g, const_cast<T*>(to.bias));
    }
    if (f.gx.data) pack_for_input<T>(l, g, by, const_cast<T*>(to.input));
  };
  const auto take_sums = [&](Arena& arena) {
    Sums<T> sums;
    if (f.gw) sums.gw = arena.take<T>(columns * x_columns);
    if (f.gb) sums.gb = arena.take<double>(columns);
    if (f.gp) sums.gp = arena.take<double>(param_size);
    return sums;
  };
  const auto clear = [&](Sums<T>& sums) {
    sums.fresh = true;
    for (int64_t j = 0; sums.gb && j < columns; ++j) sums.gb[j] = 0;
    for (int64_t j = 0; sums.gp && j < param_size; ++j) sums.gp[j] = 0;
  };
  // the parts' sums, in the order of the parts
  const auto finish = [&](const Sums<T>* all, const T* const* gw, int64_t count, int64_t by, int64_t g) {
    if (f.gb)
      for (int64_t j = 0; j < columns; ++j) {
        double s = 0;
        for (int64_t p = 0; p < count; ++p) s += all[p].gb[j];
        static_cast<T*>(f.gb)[g * columns + j] = static_cast<T>(s);
      }
    if (f.gp)
      for (int64_t j = 0; j < param_size; ++j) {
        double s = 0;
        for (int64_t p = 0; p < count; ++p) s += all[p].gp[j];
        static_cast<T*>(f.gp)[g * param_size + j] = static_cast<T>(s);
      }
    if (f.gw)
      add_weight_gradients<T>(l.parallel, by, columns, depth, 1, gw, count, static_cast<T*>(f.gw) + g * columns * depth);
  };

  Arena scratch_sizes, sums_size;
  BackwardScratch<T>(scratch_sizes, f, tile);
  take_sums(sums_size);
  const int64_t parts = by_batch ? threads : sum_parts(tiles, threads, sums_size.used());
  if (by_batch) {
    Arena sizes;
    BackwardScratch<T>(sizes, f, tile);
    take_packed(sizes);
    take_sums(sizes);
    run_parts(l.parallel, parts, [&](int64_t part) {
      Arena arena(sizes.used());
      const BackwardScratch<T> scratch(arena, f, tile);
      const Packed<T> packed = take_packed(arena);
      Sums<T> sums = take_sums(arena);
      const T* gw = sums.gw;
      const Range batch = share(l.batch, part, parts);
      for (int64_t g = batch.begin; g < batch.end; ++g) {
        if (g == batch.begin || l.weight.batch_stride != 0 || l.bias_batch_stride != 0) pack(packed, g, 1);
        clear(sums);
        backward_rows<T>(f, g, {0, tiles}, tile, packed, scratch, sums);
        finish(&sums, &gw, 1, 1, g);
      }
    });
    return;
  }
  Arena sizes;
  take_packed(sizes);
  for (int64_t p = 0; p < parts; ++p) take_sums(sizes);
  sizes.take<Sums<T>>(parts);
  sizes.take<const T*>(parts);
  Arena shared(sizes.used());
  const Packed<T> packed = take_packed(shared);
  Sums<T>* sums = shared.take<Sums<T>>(parts);
  const T** gw = shared.take<const T*>(parts);
  for (int64_t p = 0; p < parts; ++p) {
    sums[p] = take_sums(shared);
    gw[p] = sums[p].gw;
  }
  for (int64_t g = 0; g < l.batch; ++g) {
    pack(packed, g, threads);
    Queue queue;
    run_parts(l.parallel, smaller(threads, parts), [&](int64_t) {
      Arena arena(scratch_sizes.used());
      const BackwardScratch<T> scratch(arena, f, tile);
      for (int64_t part; (part = queue.next()) < parts;) {
        clear(sums[part]);
        backward_rows<T>(f, g, share(tiles, part, parts), tile, packed, scratch, sums[part]);
      }
    });
    finish(sums, gw, parts, threads, g);
  }
}

// -- act_map

template <class T>
struct Stream {
  T* data;
  int64_t row_stride, column_stride;
};

// One call where the streams lie without gaps, else a call a row.
template <class T>
void map_tile(void* function, int64_t rows, int64_t columns, const Stream<const T>* in, int inputs,
              const Stream<T>* out, int outputs) {
  const auto map = reinterpret_cast<Map<T>>(function);
  const T* source[kMaxStreams];
  int64_t stride[kMaxStreams];
  T* target[kMaxStreams];
  bool flat = true;
  for (int s = 0; s < inputs; ++s) {
    source[s] = in[s].data;
    stride[s] = in[s].column_stride;
    flat = flat && (in[s].column_stride ? in[s].row_stride == columns : in[s].row_stride == 0);
  }
  for (int s = 0; s < outputs; ++s) {
    target[s] = out[s].data;
    flat = flat && out[s].row_stride == columns;
  }
  if (flat) return map(rows * columns, source, stride, target);
  for (int64_t r = 0; r < rows; ++r) {
    map(columns, source, stride, target);
    for (int s = 0; s < inputs; ++s) source[s] += in[s].row_stride;
    for (int s = 0; s < outputs; ++s) target[s] += out[s].row_stride;
  }
}

template <class T>
void add_rows(const T* from, int64_t stride, int64_t rows, int64_t columns, T* partial, double* total) {
  // a tile in the compute type, tiles in double: the error does not grow with the number of rows
  for (int64_t j = 0; j < columns; ++j) partial[j] = T(0);
  for (int64_t r = 0; r < rows; ++r, from += stride)
    for (int64_t j = 0; j < columns; ++j) partial[j] += from[j];
  for (int64_t j = 0; j < columns; ++j) total[j] += static_cast<double>(partial[j]);
}

template <class T>
void map_rows(const MapRows& f) {
  if (f.rows * f.features == 0) return;  // the caller has zeroed the sums
  int inputs = 0, outputs = 0, summed = 0;
  Stream<const T> in[kMaxStreams];
  Stream<T> out[kMaxStreams];
  for (int s = 0; s < f.inputs; ++s)
    for (int b = 0; b < f.in[s].width; ++b)
      in[inputs++] = {static_cast<const T*>(f.in[s].data) + b * f.features * f.in[s].column_stride, f.in[s].row_stride,
                      f.in[s].column_stride};
  for (int s = 0; s < f.results; ++s) {
    summed += f.out[s].summed;
    for (int b = 0; b < f.out[s].width; ++b)
      out[outputs++] = {static_cast<T*>(f.out[s].data) + b * f.features, f.out[s].row_stride, 1};
  }
  const double work = static_cast<double>(f.rows * f.features) * (inputs + outputs) * 8;
  const int64_t tile = larger(1, smaller(f.rows, (32 << 10) / (f.features * static_cast<int64_t>(sizeof(T)))));
  const int64_t tiles = (f.rows + tile - 1) / tile;
  const int64_t parts = work < kSerialWork ? 1 : smaller(f.threads, tiles);
  Arena totals(parts * summed * f.features * static_cast<int64_t>(sizeof(double)));
  double* total = totals.take<double>(parts * summed * f.features);
  for (int64_t i = 0; i < parts * summed * f.features; ++i) total[i] = 0;

  run_parts(f.parallel, parts, [&](int64_t part) {
    Arena arena((summed * tile + 1) * f.features * static_cast<int64_t>(sizeof(T)) + 128);
    T* rows_of_sums = arena.take<T>(summed * tile * f.features);
    T* partial = arena.take<T>(f.features);
    const Range range = share(tiles, part, parts);
    for (int64_t t = range.begin; t < range.end; ++t) {
      const int64_t row = t * tile, m = smaller(tile, f.rows - row);
      Stream<const T> tile_in[kMaxStreams];
      Stream<T> tile_out[kMaxStreams];
      for (int s = 0; s < inputs; ++s)
        tile_in[s] = {in[s].data + row * in[s].row_stride, in[s].row_stride, in[s].column_stride};
      int o = 0, nth = 0;
      for (int s = 0; s < f.results; ++s)
        for (int b = 0; b < f.out[s].width; ++b, ++o)
          tile_out[o] = f.out[s].summed ? Stream<T>{rows_of_sums + nth++ * m * f.features, f.features, 1}
                                        : Stream<T>{out[o].data + row * out[o].row_stride, out[o].row_stride, 1};
      map_tile<T>(f.map, m, f.features, tile_in, inputs, tile_out, outputs);
      for (int n = 0; n < summed; ++n)
        add_rows(rows_of_sums + n * m * f.features, f.features, m, f.features, partial,
                 total + (part * summed + n) * f.features);
    }
  });
  int nth = 0;
  for (int s = 0; s < f.results; ++s) {
    if (!f.out[s].summed) continue;
    for (int64_t j = 0; j < f.features; ++j) {
      double sum = 0;
      for (int64_t p = 0; p < parts; ++p) sum += total[(p * summed + nth) * f.features + j];
      static_cast<T*>(f.out[s].data)[j] = static_cast<T>(sum);
    }
    ++nth;
  }
}

}  // namespace

#define FI_LAYER(type)                                                                             \
  void FI_JOIN(FI_EXPORTED(forward), type)(const Forward& f) { forward<type>(f); }                 \
  void FI_JOIN(FI_EXPORTED(backward), type)(const Backward& f) { backward<type>(f); }              \
  void FI_JOIN(FI_EXPORTED(map_rows), type)(const MapRows& f) { map_rows<type>(f); }
FI_LAYER(float)
FI_LAYER(double)

}  // namespace fused_inr
