// Every op schema, nothing else. Arguments are raw: the Python side validates, normalises and documents them.
#include "native.h"

PATCHLIGHT_LIBRARY(m) {
  m.def("neighbor_topk_fwd(Tensor x, int height, int width, int k, int radius, bool wrap, bool scores) -> (Tensor, Tensor)");
}
