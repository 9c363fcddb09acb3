// The vector width of the capability that this object is compiled for, given by the build (fused_inr/native.py).
#pragma once

#ifndef FUSED_INR_CAPABILITY
#define FUSED_INR_CAPABILITY generic
#endif
#ifndef FUSED_INR_VECTOR_BYTES
#define FUSED_INR_VECTOR_BYTES 16
#endif

#define FI_JOIN_(a, b) a##_##b
#define FI_JOIN(a, b) FI_JOIN_(a, b)
// e.g. engine_avx2: the only names that an object of a capability shows to the linker
#define FI_EXPORTED(name) FI_JOIN(name, FUSED_INR_CAPABILITY)
#define FI_STRING_(a) #a
#define FI_STRING(a) FI_STRING_(a)
