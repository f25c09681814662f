// Fused fp32 training kernels for one machine's CPU: plain C functions, called from the Python files next door.
//
// One translation unit: each header is one idea and includes what it needs. Every kernel has a twin in plain PyTorch,
// which says what is computed. Tensors are row-major and dense unless a stride is passed; the first argument is the
// number of threads; `room` is memory that the caller lends and whose contents mean nothing.

#include "train/attention.hpp"
#include "train/cca.hpp"
#include "train/cca_backward.hpp"
#include "train/experts.hpp"
#include "train/head.hpp"
#include "train/linear.hpp"
#include "train/normalise.hpp"
