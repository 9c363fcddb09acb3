// linear_act and act_map over tiles of rows, for one capability. A tile goes through all its steps while it is in the
// cache; what reaches memory is what the caller asked for.
#include <stdlib.h>

#include "capability.h"
#include "convert.h"
#include "engine.h"
#include "gemm.h"

namespace fused_inr {
namespace {

template <class T>
using Vector = Vec<T, FUSED_INR_VECTOR_BYTES>;

// -- memory and threads

// Aligned scratch memory, handed out in pieces. An arena without memory only measures.
class Arena {
 public:
  Arena() = default;
  explicit Arena(int64_t bytes) : begin_(nullptr) {
    void* p = nullptr;
    if (posix_memalign(&p, 64, static_cast<size_t>(bytes ? bytes : 64)) != 0) abort();
    begin_ = static_cast<char*>(p);
  }
  ~Arena() { free(begin_); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  template <class T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(begin_ + used_);
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return begin_ ? p : nullptr;
  }
  int64_t used() const { return used_; }

 private:
  char* begin_ = nullptr;
  int64_t used_ = 0;
};

template <class F>
void run_parts(Parallel parallel, int64_t parts, F f) {
  if (parts == 1) return f(0);
  parallel(parts, [](void* context, int64_t part) { (*static_cast<F*>(context))(part); }, &f);
}

struct Range {
  int64_t begin, end;
};
Range share(int64_t count, int64_t part, int64_t parts) { return {count * part / parts, count * (part + 1) / parts}; }

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Below this many operations a thread costs more than it brings.
constexpr double kSerialWork = 5e5;

int64_t parts_for(const Layer& l) {
  const double columns = static_cast<double>(l.branches * l.features);
  const double work = static_cast<double>(l.batch * l.rows) * columns * static_cast<double>(2 * l.in_features + 16);
  return work < kSerialWork ? 1 : l.threads;
}

// Rows of a tile: `columns` numbers a row shall fit `bytes`; whole register blocks; work for every thread.
template <class T>
int64_t tile_rows(int64_t rows, int64_t columns, int64_t bytes, int64_t parts) {
  constexpr int64_t block = Block<Vector<T>>::rows;
  const int64_t fit = bytes / larger(1, columns * static_cast<int64_t>(sizeof(T)));
  const int64_t most = larger(block, smaller(fit, 256) / block * block);
  return smaller(most, round_up((rows + parts - 1) / parts, block));
}

// -- maps over a tile

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

// -- shared pieces of a layer

template <class T>
const T* weight_of(const Layer& l, int64_t g) {
  return address<T>(l.weight, g, 0);
}

template <class T>
void pad_bias(const Layer& l, int64_t g, T* padded) {
  const int64_t columns = l.branches * l.features, padded_columns = round_up(columns, kPanel<Vector<T>>);
  const T* bias = static_cast<const T*>(l.bias) + g * l.bias_batch_stride;
  for (int64_t j = 0; j < columns; ++j) padded[j] = bias[j];
  for (int64_t j = columns; j < padded_columns; ++j) padded[j] = T(0);
}

// W^T for z = x W^T, in panels of z's columns, by several threads where it is large
template <class T>
void pack_for_forward(const Layer& l, int64_t g, int64_t parts, T* packed) {
  const int64_t columns = l.branches * l.features, panels = (columns + kPanel<Vector<T>> - 1) / kPanel<Vector<T>>;
  parts = columns * l.in_features < 100000 ? 1 : smaller(parts, panels);
  run_parts(l.parallel, parts, [&](int64_t part) {
    const Range r = share(panels, part, parts);
    const int64_t j = r.begin * kPanel<Vector<T>>, end = smaller(columns, r.end * kPanel<Vector<T>>);
    pack_transposed<Vector<T>>(weight_of<T>(l, g) + j * l.weight.row_stride, l.weight.row_stride, l.in_features, end - j,
                               packed + j * l.in_features);
  });
}

// W for gx = gz W, in panels of x's columns
template <class T>
void pack_for_input(const Layer& l, int64_t g, int64_t parts, T* packed) {
  const int64_t depth = l.branches * l.features, panels = (l.in_features + kPanel<Vector<T>> - 1) / kPanel<Vector<T>>;
  parts = depth * l.in_features < 100000 ? 1 : smaller(parts, panels);
  run_parts(l.parallel, parts, [&](int64_t part) {
    const Range r = share(panels, part, parts);
    const int64_t j = r.begin * kPanel<Vector<T>>, end = smaller(l.in_features, r.end * kPanel<Vector<T>>);
    pack_rows<Vector<T>>(weight_of<T>(l, g) + j, l.weight.row_stride, depth, end - j, packed + j * depth);
  });
}

// Streams [z of each branch, parameters]; returns how many.
template <class T>
int value_streams(const Layer& l, Tile<T> z, Stream<const T>* in) {
  int n = 0;
  for (int b = 0; b < l.branches; ++b) in[n++] = {z.data + b * l.features, z.stride, 1};
  for (int p = 0; p < l.params; ++p) in[n++] = {static_cast<const T*>(l.param[p]), 0, l.param_stride[p]};
  return n;
}

// -- forward

constexpr int64_t kForwardBytes = 64 << 10;   // of a tile's z: beside it the packed weights stay in the second-level cache
constexpr int64_t kBackwardBytes = 128 << 10;  // more rows a tile: the weight gradient passes through the cache once a tile

template <class T>
struct ForwardScratch {
  T *x, *y, *z;
  ForwardScratch(Arena& arena, const Forward& f, int64_t rows) {
    const Layer& l = f.layer;
    x = l.x.storage == kStorage<T> ? nullptr : arena.take<T>(rows * l.in_features);
    y = f.y.storage == kStorage<T> ? nullptr : arena.take<T>(rows * l.outputs * l.features);
    z = f.z.data ? nullptr : arena.take<T>(rows * l.branches * l.features);
  }
};

template <class T>
void forward_rows(const Forward& f, int64_t g, Range tiles, int64_t tile, const T* packed, const T* bias,
                  const ForwardScratch<T>& scratch) {
  const Layer& l = f.layer;
  const int64_t columns = l.branches * l.features;
  for (int64_t t = tiles.begin; t < tiles.end; ++t) {
    const int64_t row = t * tile, m = smaller(tile, l.rows - row);
    const Tile<T> x = read_tile<T>(l.x, g, row, m, l.in_features, scratch.x);
    const Tile<T> z = f.z.data ? Tile<T>{address<T>(f.z, g, row), f.z.row_stride} : Tile<T>{scratch.z, columns};
    product<Vector<T>>(m, columns, l.in_features, x.data, x.stride, packed, z.data, z.stride, bias);
    const Tile<T> y = target_tile<T>(f.y, g, row, l.outputs * l.features, scratch.y);
    Stream<const T> in[kMaxStreams];
    Stream<T> out[kMaxStreams];
    const int inputs = value_streams(l, z, in);
    for (int c = 0; c < l.outputs; ++c) out[c] = {y.data + c * l.features, y.stride, 1};
    map_tile<T>(l.map, m, l.features, in, inputs, out, l.outputs);
    write_tile<T>(f.y, g, row, m, l.outputs * l.features, y.data);
  }
}

template <class T>
void forward(const Forward& f) {
  using V = Vector<T>;
  const Layer& l = f.layer;
  const int64_t columns = l.branches * l.features;
  if (l.batch * l.rows * columns == 0) return;
  const int64_t threads = parts_for(l);
  const bool by_batch = l.batch > 1 && l.batch >= threads;  // a layer a thread, else a layer by all threads
  const int64_t tile = tile_rows<T>(l.rows, columns, kForwardBytes, by_batch ? 1 : threads);
  const int64_t tiles = (l.rows + tile - 1) / tile;
  const int64_t weight_size = packed_size<V>(l.in_features, columns), bias_size = round_up(columns, kPanel<V>);

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
        forward_rows<T>(f, g, {0, tiles}, tile, packed, bias, scratch);
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
    run_parts(l.parallel, parts, [&](int64_t part) {
      Arena arena(sizes.used());
      const ForwardScratch<T> scratch(arena, f, tile);
      forward_rows<T>(f, g, share(tiles, part, parts), tile, packed, bias, scratch);
    });
  }
}

// -- backward

template <class T>
struct BackwardScratch {
  T *x, *g, *z, *gz, *gx, *gp, *packed_x, *column, *sums;
  BackwardScratch(Arena& arena, const Backward& f, int64_t rows) {
    const Layer& l = f.layer;
    const int64_t columns = l.branches * l.features;
    x = l.x.storage == kStorage<T> ? nullptr : arena.take<T>(rows * l.in_features);
    g = f.g.storage == kStorage<T> ? nullptr : arena.take<T>(rows * l.outputs * l.features);
    z = f.z.data ? nullptr : arena.take<T>(rows * columns);
    gz = arena.take<T>(rows * columns);
    gx = !f.gx.data || f.gx.storage == kStorage<T> ? nullptr : arena.take<T>(rows * l.in_features);
    gp = f.gp ? arena.take<T>(rows * l.params * l.features) : nullptr;
    packed_x = f.gw ? arena.take<T>(packed_size<Vector<T>>(rows, l.in_features)) : nullptr;
    column = f.gw ? arena.take<T>(rows * Block<Vector<T>>::rows) : nullptr;
    sums = arena.take<T>(columns);
  }
};

// What the rows of one part add up to.
template <class T>
struct Sums {
  T* gw = nullptr;  // [columns, stride]
  int64_t stride = 0;
  double *gb = nullptr, *gp = nullptr;
  bool fresh = true;
};

template <class T>
struct Packed {
  const T *forward, *input, *bias;
};

template <class T>
void backward_rows(const Backward& f, int64_t g, Range tiles, int64_t tile, Packed<T> packed,
                   const BackwardScratch<T>& scratch, Sums<T>& sums) {
  using V = Vector<T>;
  const Layer& l = f.layer;
  const int64_t columns = l.branches * l.features, depth = l.in_features;
  for (int64_t t = tiles.begin; t < tiles.end; ++t) {
    const int64_t row = t * tile, m = smaller(tile, l.rows - row);
    Tile<T> x{nullptr, 0}, z{nullptr, 0};
    if (f.gw || !f.z.data) x = read_tile<T>(l.x, g, row, m, depth, scratch.x);
    if (f.z.data) {
      z = {address<T>(f.z, g, row), f.z.row_stride};
    } else {
      z = {scratch.z, columns};
      product<V>(m, columns, depth, x.data, x.stride, packed.forward, z.data, z.stride, packed.bias);
    }

    const Tile<T> cotangent = read_tile<T>(f.g, g, row, m, l.outputs * l.features, scratch.g);
    Stream<const T> in[kMaxStreams];
    Stream<T> out[kMaxStreams];
    int inputs = value_streams(l, z, in), outputs = 0;
    for (int c = 0; c < l.outputs; ++c) in[inputs++] = {cotangent.data + c * l.features, cotangent.stride, 1};
    for (int b = 0; b < l.branches; ++b) out[outputs++] = {scratch.gz + b * l.features, columns, 1};
    if (f.gp)
      for (int p = 0; p < l.params; ++p) out[outputs++] = {scratch.gp + p * m * l.features, l.features, 1};
    map_tile<T>(l.map, m, l.features, in, inputs, out, outputs);

    if (sums.gb) add_rows(scratch.gz, columns, m, columns, scratch.sums, sums.gb);
    if (sums.gp)
      for (int p = 0; p < l.params; ++p)
        add_rows(scratch.gp + p * m * l.features, l.features, m, l.features, scratch.sums, sums.gp + p * l.features);
    if (f.gx.data) {
      const Tile<T> gx = target_tile<T>(f.gx, g, row, depth, scratch.gx);
      product<V>(m, depth, columns, scratch.gz, columns, packed.input, gx.data, gx.stride, nullptr);
      write_tile<T>(f.gx, g, row, m, depth, gx.data);
    }
    if (sums.gw) {
      pack_rows<V>(x.data, x.stride, m, depth, scratch.packed_x);
      outer_product<V>(m, columns, depth, scratch.gz, columns, scratch.packed_x, sums.gw, sums.stride, !sums.fresh,
                       scratch.column);
    }
    sums.fresh = false;
  }
}

template <class T>
void backward(const Backward& f) {
  using V = Vector<T>;
  const Layer& l = f.layer;
  const int64_t columns = l.branches * l.features, depth = l.in_features;
  if (l.batch * l.rows * columns == 0) return;  // the caller has zeroed the sums
  const int64_t threads = parts_for(l);
  const bool by_batch = l.batch > 1 && l.batch >= threads;
  // a tile's gradients are at least half the size of the weight gradient that passes through the cache beside them
  const int64_t own = f.gw ? columns * depth * static_cast<int64_t>(sizeof(T)) / 2 : 0;
  const int64_t tile = tile_rows<T>(l.rows, columns, larger(kBackwardBytes, own), by_batch ? 1 : threads);
  const int64_t tiles = (l.rows + tile - 1) / tile;
  const int64_t parts = by_batch ? threads : smaller(threads, tiles);
  const int64_t forward_size = f.z.data ? 0 : packed_size<V>(depth, columns), bias_size = round_up(columns, kPanel<V>);
  const int64_t input_size = f.gx.data ? packed_size<V>(columns, depth) : 0;
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
  const auto take_sums = [&](Arena& arena, bool own_weight) {
    Sums<T> sums;
    sums.stride = own_weight ? round_up(depth, kPanel<V>) : depth;
    if (f.gw && own_weight) sums.gw = arena.take<T>(columns * sums.stride);
    if (f.gb) sums.gb = arena.take<double>(columns);
    if (f.gp) sums.gp = arena.take<double>(param_size);
    return sums;
  };
  const auto clear = [&](Sums<T>& sums) {
    sums.fresh = true;
    for (int64_t j = 0; sums.gb && j < columns; ++j) sums.gb[j] = 0;
    for (int64_t j = 0; sums.gp && j < param_size; ++j) sums.gp[j] = 0;
  };
  T* const gw = static_cast<T*>(f.gw);
  // the parts' sums, in the order of the parts
  const auto finish = [&](const Sums<T>* all, int64_t count, int64_t g) {
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
    if (f.gw && count > 1) {
      run_parts(l.parallel, columns * depth < 50000 ? 1 : smaller(count, columns), [&](int64_t part) {
        const Range r = share(columns, part, columns * depth < 50000 ? 1 : smaller(count, columns));
        for (int64_t i = r.begin; i < r.end; ++i) {
          T* to = gw + (g * columns + i) * depth;
          for (int64_t j = 0; j < depth; ++j) to[j] = all[0].gw[i * all[0].stride + j];
          for (int64_t p = 1; p < count; ++p)
            for (int64_t j = 0; j < depth; ++j) to[j] += all[p].gw[i * all[p].stride + j];
        }
      });
    }
  };

  Arena scratch_sizes;
  BackwardScratch<T>(scratch_sizes, f, tile);
  if (by_batch) {
    Arena sizes;
    BackwardScratch<T>(sizes, f, tile);
    take_packed(sizes);
    take_sums(sizes, false);
    run_parts(l.parallel, parts, [&](int64_t part) {
      Arena arena(sizes.used());
      const BackwardScratch<T> scratch(arena, f, tile);
      const Packed<T> packed = take_packed(arena);
      Sums<T> sums = take_sums(arena, false);
      const Range batch = share(l.batch, part, parts);
      for (int64_t g = batch.begin; g < batch.end; ++g) {
        if (g == batch.begin || l.weight.batch_stride != 0 || l.bias_batch_stride != 0) pack(packed, g, 1);
        clear(sums);
        if (gw) sums.gw = gw + g * columns * depth;
        backward_rows<T>(f, g, {0, tiles}, tile, packed, scratch, sums);
        finish(&sums, 1, g);
      }
    });
    return;
  }
  Arena sizes;
  take_packed(sizes);
  for (int64_t p = 0; p < parts; ++p) take_sums(sizes, parts > 1);
  sizes.take<Sums<T>>(parts);
  Arena shared(sizes.used());
  const Packed<T> packed = take_packed(shared);
  Sums<T>* sums = shared.take<Sums<T>>(parts);
  for (int64_t p = 0; p < parts; ++p) sums[p] = take_sums(shared, parts > 1);
  for (int64_t g = 0; g < l.batch; ++g) {
    pack(packed, g, parts);
    run_parts(l.parallel, parts, [&](int64_t part) {
      Arena arena(scratch_sizes.used());
      const BackwardScratch<T> scratch(arena, f, tile);
      clear(sums[part]);
      if (gw && parts == 1) sums[part].gw = gw + g * columns * depth;
      backward_rows<T>(f, g, share(tiles, part, parts), tile, packed, scratch, sums[part]);
    });
    finish(sums, parts, g);
  }
}

// -- act_map

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

extern const Maps FI_JOIN(FI_EXPORTED(maps), float)[];
extern const Maps FI_JOIN(FI_EXPORTED(maps), double)[];
extern const Primitive FI_JOIN(FI_EXPORTED(primitives), float)[];
extern const Primitive FI_JOIN(FI_EXPORTED(primitives), double)[];

extern const Engine FI_EXPORTED(engine);
const Engine FI_EXPORTED(engine) = {
    FI_STRING(FUSED_INR_CAPABILITY),
    {forward<float>, forward<double>},
    {backward<float>, backward<double>},
    {map_rows<float>, map_rows<double>},
    {FI_JOIN(FI_EXPORTED(maps), float), FI_JOIN(FI_EXPORTED(maps), double)},
    {FI_JOIN(FI_EXPORTED(primitives), float), FI_JOIN(FI_EXPORTED(primitives), double)}};

}  // namespace fused_inr
