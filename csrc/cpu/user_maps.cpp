// A user's formula as a library of its own, compiled at run time (fused_inr/native.py, compile_maps): the generated header
// FUSED_INR_MAPS_HEADER with one activation in it, for the running capability. No PyTorch here.
#include "map_table.h"

#include FUSED_INR_MAPS_HEADER

#include "capability.h"

namespace fused_inr {
namespace {

namespace of_float {
using T = float;
using V = Vec<T, FUSED_INR_VECTOR_BYTES>;
FUSED_INR_ACTIVATIONS(FI_MAPS)
const Maps rows[] = {FUSED_INR_ACTIVATIONS(FI_ROW)};
}  // namespace of_float

namespace of_double {
using T = double;
using V = Vec<T, FUSED_INR_VECTOR_BYTES>;
FUSED_INR_ACTIVATIONS(FI_MAPS)
const Maps rows[] = {FUSED_INR_ACTIVATIONS(FI_ROW)};
}  // namespace of_double

}  // namespace
}  // namespace fused_inr

extern "C" __attribute__((visibility("default"))) const int fused_inr_user_maps_size = 3 + 2 * fused_inr::kSlots;

// branches, outputs, parameters, then the addresses of every slot for float and for double
extern "C" __attribute__((visibility("default"))) void fused_inr_user_maps(int64_t* to) {
  using namespace fused_inr;
  const Maps* rows[] = {of_float::rows, of_double::rows};
  to[0] = rows[0]->branches;
  to[1] = rows[0]->outputs;
  to[2] = rows[0]->params;
  for (int type = 0; type < 2; ++type)
    for (int s = 0; s < kSlots; ++s) to[3 + type * kSlots + s] = reinterpret_cast<int64_t>(rows[type]->map[s]);
}
