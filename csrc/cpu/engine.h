// What the objects of each capability offer to the operators (../native.h): plain structs and raw pointers.
//
// This header and everything under csrc/cpu stays free of PyTorch: those objects are compiled with their own machine
// flags, and an inline function of a shared header compiled for AVX-512 must not end up serving the rest of the program.
#pragma once

#include <stdint.h>

#include "../streams.h"

namespace fused_inr {

// void map(n, in, stride, out): n elements of a map; a stride is 0 (one value for all) or 1
template <class T>
using Map = void (*)(int64_t n, const T* const* in, const int64_t* stride, T* const* out);

constexpr int kMaxStreams = 96;  // of one map, inputs or outputs

struct Maps {  // of one scalar type
  const char* name;
  int branches, outputs, params;
  void* map[kSlots];
};

struct Primitive {
  const char* name;
  int arguments, results;
  void* map;
};

// Rows of numbers; neighbours within a row are next to each other.
struct Rows {
  void* data = nullptr;
  int64_t batch_stride = 0, row_stride = 0;  // in elements
  Storage storage = Storage::float32;
};

// Runs task(context, 0 .. parts - 1), on several threads if it can.
using Parallel = void (*)(int64_t parts, void (*task)(void* context, int64_t part), void* context);

struct Layer {
  int64_t batch = 1, rows = 0, in_features = 0, features = 0;  // features: of one branch
  int branches = 1, outputs = 1, params = 0;
  Rows x, weight;                   // weight in the compute type
  const void* bias = nullptr;       // compute type, [branches * features]
  int64_t bias_batch_stride = 0;
  const void* param[kMaxStreams] = {};  // compute type
  int64_t param_stride[kMaxStreams] = {};
  void* map = nullptr;
  Parallel parallel = nullptr;
  int threads = 1;
};

struct Forward {
  Layer layer;
  Rows y, z;  // z.data null: not wanted
};

struct Backward {
  Layer layer;   // layer.map: the vector-Jacobian product
  Rows g, z;     // z.data null: recomputed
  Rows gx;       // data null: not wanted
  void* gw = nullptr;  // compute type, [batch, branches * features, in_features], or null
  void* gb = nullptr;  // compute type, [batch, branches * features], or null
  void* gp = nullptr;  // compute type, [batch, params, features], or null; layer.map is then the learnable variant
};

// One group of streams of a map over rows: `width` streams of `features` columns side by side.
struct Group {
  void* data = nullptr;
  int64_t row_stride = 0, column_stride = 0;  // column_stride 0 or 1
  int width = 1;
  bool summed = false;  // outputs: added over the rows into `features` numbers of the compute type
};

struct MapRows {
  int64_t rows = 0, features = 0;
  int inputs = 0, results = 0;
  Group in[kMaxStreams], out[kMaxStreams];
  void* map = nullptr;
  Parallel parallel = nullptr;
  int threads = 1;
};

// -- a whole network: every layer of a tile of rows before the next tile

constexpr int kMaxParams = 32;

struct NetworkLayer {
  int64_t in_channels = 1, in_channel = 0;  // its input: the outputs of the layer before, of so many features each
  int64_t features = 0;                     // of one branch
  int branches = 1, outputs = 1, params = 0;
  bool skip = false;           // output (map(z) + input) / sqrt(2); as many columns, and not of the identity
  bool norm = false;           // a norm of map(z), over all outputs * features columns, before the sum of a skip
  bool centred = true;         // LayerNorm, else RMSNorm
  double eps = 0;
  const void *gamma = nullptr, *beta = nullptr;  // of the norm: compute type, [outputs * features]; null: 1, 0
  Rows weight;                 // compute type
  const void* bias = nullptr;  // compute type, [branches * features]
  const void* param[kMaxParams] = {};
  int64_t param_stride[kMaxParams] = {};
  void* value = nullptr;  // the map; null: the identity
  void* jet = nullptr;    // its jet, the learnable one where gp is wanted; null in a forward
  void *gw = nullptr, *gb = nullptr, *gp = nullptr;  // compute type, as in Backward; null: not wanted
  void *g_gamma = nullptr, *g_beta = nullptr;        // compute type, [outputs * features]; null: not wanted
};

struct Network {
  int64_t rows = 0;
  int layers = 0;
  const NetworkLayer* layer = nullptr;
  Rows x;
  bool bfloat16 = false;  // forward: products of bfloat16 (of an engine that has them, on a processor that has them)
  Parallel parallel = nullptr;
  int threads = 1;
};

struct NetworkForward {
  Network network;
  Rows y;
  void* saved = nullptr;  // network_saved elements of the compute type; null: not wanted
};

struct NetworkLoss {
  void* jet = nullptr;  // of (prediction, target), as an activation with two branches; null: no loss
  int params = 0;
  const void* param[kMaxParams] = {};
  Rows target;
  const void* row_weight = nullptr;  // [rows], or null: 1
  double scale = 1;
  double* value = nullptr;  // of the sum, scaled
};

struct NetworkBackward {
  Network network;
  Rows g;            // of y; not read where there is a loss
  NetworkLoss loss;
  const void* saved = nullptr;  // null: the forward is computed again, tile by tile
  Rows gx;                      // data null: not wanted
};

// Sums of the values of a map's jet, their squares and fourth powers, over normal pre-activations (section 8).
struct Moments {
  int64_t settings = 0, start = 0, samples = 0;
  uint64_t seed = 0;
  int branches = 1, outputs = 1, params = 0;
  const float* sigma = nullptr;  // [settings, branches]
  const float* param = nullptr;  // [settings, params]
  void* jet = nullptr;           // of float32
  double* sums = nullptr;        // [chunks, settings, outputs * (1 + branches), 3]
  Parallel parallel = nullptr;
  int threads = 1;
};

struct Engine {
  const char* name;
  void (*forward[2])(const Forward&);
  void (*backward[2])(const Backward&);
  void (*map_rows[2])(const MapRows&);
  int64_t (*network_saved[2])(const Network&);  // elements that a forward saves
  void (*network_forward[2])(const NetworkForward&);
  void (*network_backward[2])(const NetworkBackward&);
  // so many operations of the micro-kernel on numbers that lie in the cache: what products cost at least
  void (*product_floor[2])(double operations, int64_t width, Parallel parallel, int threads);
  void (*moments)(const Moments&);
  void (*random_bits)(int64_t start, int64_t count, int64_t branch, uint64_t seed, int64_t* to);
  const bool* multiplies_bfloat16;  // whether this engine has such products; the processor must have them, too
  const Maps* maps[2];  // float32, float64; the last row has no name
  const Primitive* primitives[2];
};

}  // namespace fused_inr
