// The table of one capability: the functions that its objects offer, of float32 and of float64.
#include "engine.h"

#include "capability.h"

namespace fused_inr {

#define FI_OF(name, type) FI_JOIN(FI_EXPORTED(name), type)
#define FI_PAIR(name) {FI_OF(name, float), FI_OF(name, double)}
#define FI_OF_TYPE(type)                                                 \
  extern const Maps FI_OF(maps, type)[];                                 \
  extern const Primitive FI_OF(primitives, type)[];                      \
  void FI_OF(forward, type)(const Forward&);                             \
  void FI_OF(backward, type)(const Backward&);                           \
  void FI_OF(map_rows, type)(const MapRows&);                            \
  int64_t FI_OF(network_saved, type)(const Network&);                    \
  void FI_OF(network_forward, type)(const NetworkForward&);              \
  void FI_OF(network_backward, type)(const NetworkBackward&);            \
  void FI_OF(product_floor, type)(double, int64_t, Parallel, int);
FI_OF_TYPE(float)
FI_OF_TYPE(double)
extern const bool FI_EXPORTED(multiplies_bfloat16);
void FI_EXPORTED(moments)(const Moments&);
void FI_EXPORTED(random_bits)(int64_t, int64_t, int64_t, uint64_t, int64_t*);

extern const Engine FI_EXPORTED(engine);
const Engine FI_EXPORTED(engine) = {
    FI_STRING(FUSED_INR_CAPABILITY),
    FI_PAIR(forward),
    FI_PAIR(backward),
    FI_PAIR(map_rows),
    FI_PAIR(network_saved),
    FI_PAIR(network_forward),
    FI_PAIR(network_backward),
    FI_PAIR(product_floor),
    FI_EXPORTED(moments),
    FI_EXPORTED(random_bits),
    &FI_EXPORTED(multiplies_bfloat16),
    FI_PAIR(maps),
    FI_PAIR(primitives)};

}  // namespace fused_inr
