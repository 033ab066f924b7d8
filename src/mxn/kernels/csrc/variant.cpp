// The table of one variant's kernels.
#include "common.h"
#include "variants.h"

namespace mxn {
namespace MXN_NS {
int tile_rows();
void tile_rows_of(const Rows&, int64_t, int64_t, int8_t*);
void gemm(const Weight&, const Rows&, int64_t, int64_t, int64_t, int64_t, float*, int64_t, bool);
void gemm_glu(const Weight&, const Rows&, int64_t, int64_t, int64_t, int64_t, float*, int64_t, Act);
void rms_norm(const float*, const float*, float*, int64_t, float);
void quantize(const float*, int64_t, int64_t, int64_t, int8_t*, float*, float*, int32_t*);
void activate_row(const float*, float*, int64_t, Act);
void add_row(const float*, float, float*, int64_t);
void rope(float*, const float*, const float*, int, bool);
void cache_write(const CacheShape&, uint8_t*, const int64_t*, int64_t, int, const float*, const float*);
void attend(const Attend&);
void softcap_row(float*, int64_t, float);
int64_t argmax_row(const float*, int64_t);
void pack_block(const float* const*, int64_t, int64_t, int64_t, int, uint8_t*, float*, float*);
int64_t choose_token(const float*, int64_t, const ChoiceRule&, float*);
}  // namespace MXN_NS

#define MXN_JOIN(a, b) a##b
#define MXN_TABLE(ns) MXN_JOIN(kernels_, ns)
#define MXN_TEXT(ns) #ns
#define MXN_NAME(ns) MXN_TEXT(ns)

const Kernels& MXN_TABLE(MXN_NS)() {
  namespace v = MXN_NS;
  static const Kernels table{MXN_NAME(MXN_NS), v::tile_rows(), v::tile_rows_of, v::gemm, v::gemm_glu, v::rms_norm,
                             v::quantize, v::activate_row, v::add_row, v::rope, v::cache_write,
                             v::attend, v::softcap_row, v::argmax_row, v::pack_block, v::choose_token};
  return table;
}

}  // namespace mxn
