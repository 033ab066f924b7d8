// What Python sees of the native kernels. Memory is passed as addresses: the callers in
// `mxn.kernels.native` own it, check shapes and keep it alive.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "bind_sample.h"
#include "decoder.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace mxn {
namespace {

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// A pointer as an integer attribute.
#define MXN_POINTER(Class, name)                                                                 \
  .def_prop_rw(                                                                                  \
      #name, [](const Class& c) { return reinterpret_cast<uintptr_t>(c.name); },                 \
      [](Class& c, uintptr_t p) { c.name = at<std::remove_pointer_t<decltype(c.name)>>(p); })

nb::list all_variants() {
  nb::list found;
  for (const Variant& v : variants()) found.append(nb::make_tuple(v.name, v.is_usable()));
  return found;
}

void bind_weight(nb::module_& m) {
  m.attr("revision") = MXN_REVISION;
  nb::enum_<Format>(m, "Format").value("f32", Format::f32).value("bf16", Format::bf16).value("u8", Format::u8).value("u4", Format::u4).value("u6", Format::u6);
  nb::enum_<Act>(m, "Act").value("silu", Act::silu).value("gelu", Act::gelu).value("gelu_tanh", Act::gelu_tanh).value("relu", Act::relu);
  nb::enum_<CacheType>(m, "CacheType").value("f32", CacheType::f32).value("bf16", CacheType::bf16).value("i8", CacheType::i8);
  nb::class_<Weight>(m, "Weight")
      .def(nb::init<>())
      .def_rw("format", &Weight::format)
      .def_rw("n", &Weight::n)
      .def_rw("k", &Weight::k)
      .def_rw("k_padded", &Weight::k_padded)
      .def_rw("group", &Weight::group)
      .def_rw("tiled_from", &Weight::tiled_from)
      .def_rw("gain", &Weight::gain) MXN_POINTER(Weight, data) MXN_POINTER(Weight, scales)
          MXN_POINTER(Weight, mins) MXN_POINTER(Weight, bias);
  nb::class_<CacheShape>(m, "CacheShape")
      .def(nb::init<>())
      .def_rw("type", &CacheShape::type)
      .def_rw("heads", &CacheShape::heads)
      .def_rw("k_dim", &CacheShape::k_dim)
      .def_rw("v_dim", &CacheShape::v_dim)
      .def_rw("latent", &CacheShape::latent)
      .def_rw("page_tokens", &CacheShape::page_tokens)
      .def_rw("num_pages", &CacheShape::num_pages)
      .def_prop_ro("page_bytes", &CacheShape::page_bytes);
}

void bind_layers(nb::module_& m) {
  nb::class_<Rope>(m, "Rope")
      .def(nb::init<>())
      .def_rw("half", &Rope::half)
      .def_rw("is_interleaved", &Rope::is_interleaved) MXN_POINTER(Rope, cos) MXN_POINTER(Rope, sin);
  nb::class_<Attention>(m, "Attention")
      .def(nb::init<>())
      .def_rw("heads", &Attention::heads)
      .def_rw("kv_heads", &Attention::kv_heads)
      .def_rw("head_dim", &Attention::head_dim)
      .def_rw("scale", &Attention::scale)
      .def_rw("softcap", &Attention::softcap)
      .def_rw("window", &Attention::window)
      .def_rw("qk_norm", &Attention::qk_norm) MXN_POINTER(Attention, q_norm) MXN_POINTER(Attention, k_norm)
      .def_rw("rope", &Attention::rope)
      .def_rw("phi", &Attention::phi)
      .def_rw("margin", &Attention::margin)
      .def_rw("qkv", &Attention::qkv)
      .def_rw("out", &Attention::out)
      .def_rw("is_mla", &Attention::is_mla)
      .def_rw("has_q_lora", &Attention::has_q_lora)
      .def_rw("nope_dim", &Attention::nope_dim)
      .def_rw("rope_dim", &Attention::rope_dim)
      .def_rw("v_dim", &Attention::v_dim)
      .def_rw("latent", &Attention::latent)
      .def_rw("q_rank", &Attention::q_rank)
      .def_rw("latent_eps", &Attention::latent_eps)
      .def_rw("q", &Attention::q)
      .def_rw("q_a", &Attention::q_a)
      .def_rw("q_b", &Attention::q_b)
      .def_rw("kv_a", &Attention::kv_a) MXN_POINTER(Attention, q_a_norm) MXN_POINTER(Attention, kv_a_norm)
      .def("add_head", [](Attention& a, const Weight& key_up, const Weight& value_up) {
        a.key_up.push_back(key_up);
        a.value_up.push_back(value_up);
      });
  nb::class_<Mlp>(m, "Mlp")
      .def(nb::init<>())
      .def_rw("intermediate", &Mlp::intermediate)
      .def_rw("act", &Mlp::act)
      .def_rw("is_gated", &Mlp::is_gated)
      .def_rw("up", &Mlp::up)
      .def_rw("down", &Mlp::down);
  nb::class_<Moe>(m, "Moe")
      .def(nb::init<>())
      .def_rw("num_experts", &Moe::num_experts)
      .def_rw("top_k", &Moe::top_k)
      .def_rw("num_groups", &Moe::num_groups)
      .def_rw("top_groups", &Moe::top_groups)
      .def_rw("is_sigmoid", &Moe::is_sigmoid)
      .def_rw("is_normalized", &Moe::is_normalized)
      .def_rw("is_top2_sum", &Moe::is_top2_sum)
      .def_rw("scale", &Moe::scale)
      .def_rw("router", &Moe::router) MXN_POINTER(Moe, bias)
      .def_rw("has_shared", &Moe::has_shared)
      .def_rw("has_shared_gate", &Moe::has_shared_gate)
      .def_rw("shared", &Moe::shared)
      .def_rw("shared_gate", &Moe::shared_gate)
      .def("add_expert", [](Moe& moe, const Mlp& mlp) { moe.experts.push_back(mlp); });
  nb::class_<Layer>(m, "Layer")
      .def(nb::init<>()) MXN_POINTER(Layer, pre_attn) MXN_POINTER(Layer, post_attn) MXN_POINTER(Layer, pre_ffn)
          MXN_POINTER(Layer, post_ffn)
      .def_rw("residual_scale", &Layer::residual_scale)
      .def_rw("attention", &Layer::attention)
      .def_rw("is_moe", &Layer::is_moe)
      .def_rw("mlp", &Layer::mlp)
      .def_rw("moe", &Layer::moe)
      .def_rw("cache", &Layer::cache);
}

void forward(Decoder& decoder, Pool& pool, int64_t num_tokens, int64_t num_sequences, int64_t num_rows,
             int64_t table_width, uintptr_t tokens, uintptr_t positions, uintptr_t query_starts,
             uintptr_t context_lens, uintptr_t pages, uintptr_t rows, uintptr_t caches, uintptr_t logits,
             uintptr_t hidden_in, uintptr_t hidden_out) {
  Step step;
  step.num_tokens = num_tokens, step.num_sequences = num_sequences, step.num_rows = num_rows;
  step.table_width = table_width;
  step.tokens = at<const int64_t>(tokens), step.positions = at<const int64_t>(positions);
  step.query_starts = at<const int64_t>(query_starts), step.context_lens = at<const int64_t>(context_lens);
  step.pages = at<const int64_t>(pages), step.rows = at<const int64_t>(rows);
  step.caches = at<uint8_t* const>(caches), step.logits = at<float>(logits);
  step.hidden_in = at<const float>(hidden_in), step.hidden_out = at<float>(hidden_out);
  decoder.forward(pool, step);
}

void bind_decoder(nb::module_& m) {
  nb::class_<Decoder>(m, "Decoder")
      .def(nb::init<>())
      .def_rw("hidden", &Decoder::hidden)
      .def_rw("vocab", &Decoder::vocab)
      .def_rw("eps", &Decoder::eps)
      .def_rw("embedding_scale", &Decoder::embedding_scale)
      .def_rw("logit_scale", &Decoder::logit_scale)
      .def_rw("logit_softcap", &Decoder::logit_softcap)
      .def_rw("act_group", &Decoder::act_group)
      .def_rw("embedding", &Decoder::embedding)
      .def_rw("is_table", &Decoder::is_table) MXN_POINTER(Decoder, final_norm)
      .def_rw("head", &Decoder::head)
      .def_rw("is_prediction", &Decoder::is_prediction)
      .def_rw("merge", &Decoder::merge) MXN_POINTER(Decoder, token_norm) MXN_POINTER(Decoder, hidden_norm)
      .def_prop_ro("num_recomputed", &Decoder::num_recomputed)
      .def("begin_calibration", &Decoder::begin_calibration)
      .def("end_calibration", &Decoder::end_calibration)
      .def("ranges", [](const Decoder& d) {
        nb::list found;
        for (const auto& r : d.ranges()) found.append(nb::make_tuple(r.low, r.high, r.rows));
        return found;
      })
      .def("set_maximum", [](Decoder& d, size_t layer, float phi, float margin) {
        d.layers.at(layer).attention.phi = phi;
        d.layers.at(layer).attention.margin = margin;
      })
      .def("add_rope", [](Decoder& d, const Rope& r) { d.ropes.push_back(r); })
      .def("set_rope", [](Decoder& d, size_t i, const Rope& r) { d.ropes.at(i) = r; })
      .def("add_layer", [](Decoder& d, const Layer& l) { d.layers.push_back(l); })
      .def("set_pages", [](Decoder& d, int page_tokens, int64_t num_pages) {
        for (Layer& layer : d.layers) {
          layer.cache.page_tokens = page_tokens;
          layer.cache.num_pages = num_pages;
        }
      })
      .def("forward", forward, nb::call_guard<nb::gil_scoped_release>());
}

void bind_ops(nb::module_& m) {
  m.def(
      "linear",
      [](Pool& pool, const Weight& w, uintptr_t x, int64_t ldx, int64_t rows, uintptr_t y, int64_t ldy,
         int64_t act_group, bool is_added) {
        Packed packed;
        const Rows& made = packed.make(pool, w, at<const float>(x), ldx, rows, nullptr, 0.0f, act_group);
        multiply(pool, w, made, rows, at<float>(y), ldy, is_added);
      },
      "pool"_a, "w"_a, "x"_a, "ldx"_a, "rows"_a, "y"_a, "ldy"_a, "act_group"_a, "is_added"_a = false,
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "linear_glu",
      [](Pool& pool, const Weight& w, uintptr_t x, int64_t ldx, int64_t rows, uintptr_t y, int64_t ldy,
         int64_t act_group, Act act) {
        Packed packed;
        const Rows& made = packed.make(pool, w, at<const float>(x), ldx, rows, nullptr, 0.0f, act_group);
        multiply_glu(pool, w, made, rows, at<float>(y), ldy, act);
      },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "pack",
      [](Pool& pool, uintptr_t rows, int64_t ld, uintptr_t order, int64_t num_blocks, int64_t k, int64_t k_padded,
         int64_t group, int bits, uintptr_t data, uintptr_t scales, uintptr_t mins) {
        const float* from = at<const float>(rows);
        const int64_t* source = at<const int64_t>(order);
        const int64_t block_bytes = k_padded * kLanes * bits / 8, per_block = k_padded / group * kLanes;
        pool.run(num_blocks, [&](int64_t block, int) {
          const float* sixteen[kLanes];
          for (int i = 0; i < kLanes; ++i) {
            const int64_t row = source[block * kLanes + i];
            sixteen[i] = row < 0 ? nullptr : from + row * ld;
          }
          kernels().pack_block(sixteen, k, k_padded, group, bits, at<uint8_t>(data) + block * block_bytes,
                               at<float>(scales) + block * per_block,
                               mins ? at<float>(mins) + block * per_block : nullptr);
        });
      },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "argmax",
      [](Pool& pool, uintptr_t x, int64_t ldx, int64_t rows, int64_t n, uintptr_t ids) {
        pool.run(rows, [&](int64_t row, int) {
          at<int64_t>(ids)[row] = kernels().argmax(at<const float>(x) + row * ldx, n);
        });
      },
      nb::call_guard<nb::gil_scoped_release>());
  m.def("rms_norm", [](uintptr_t x, uintptr_t w, uintptr_t y, int64_t rows, int64_t n, float eps) {
    for (int64_t i = 0; i < rows; ++i) kernels().rms_norm(at<const float>(x) + i * n, at<const float>(w), at<float>(y) + i * n, n, eps);
  });
  m.def("quantize", [](uintptr_t x, int64_t k, int64_t k_padded, int64_t group, uintptr_t q, uintptr_t scales,
                       uintptr_t sums, uintptr_t isums) {
    kernels().quantize(at<const float>(x), k, k_padded, group, at<int8_t>(q), at<float>(scales), at<float>(sums), at<int32_t>(isums));
  });
  m.def("activate", [](uintptr_t x, uintptr_t y, int64_t n, Act act) {
    kernels().activate(at<const float>(x), at<float>(y), n, act);
  });
  m.def("rope", [](uintptr_t x, uintptr_t cos, uintptr_t sin, int half, bool is_interleaved) {
    kernels().rope(at<float>(x), at<const float>(cos), at<const float>(sin), half, is_interleaved);
  });
  m.def("softcap", [](uintptr_t x, int64_t n, float cap) { kernels().softcap(at<float>(x), n, cap); });
  m.def("cache_write", [](const CacheShape& shape, uintptr_t cache, uintptr_t pages, int64_t position, int head,
                          uintptr_t k, uintptr_t v) {
    kernels().cache_write(shape, at<uint8_t>(cache), at<const int64_t>(pages), position, head, at<const float>(k), at<const float>(v));
  });
  m.def("attend", [](const CacheShape& shape, uintptr_t cache, uintptr_t pages, int head, int num_rows, uintptr_t q,
                     uintptr_t limits, int64_t begin, int64_t end, int64_t window, float scale, float softcap,
                     float phi, float margin, uintptr_t out, uintptr_t den, uintptr_t ref, uintptr_t flag) {
    if (num_rows > kMaxQueryRows) {
      throw std::invalid_argument("attend: " + std::to_string(num_rows) + " query rows, at most " + std::to_string(kMaxQueryRows));
    }
    std::vector<float> scratch(static_cast<size_t>(attend_scratch(shape.k_dim, shape.v_dim ? shape.v_dim : shape.latent)));
    Attend call;
    call.shape = shape, call.cache = at<const uint8_t>(cache), call.pages = at<const int64_t>(pages);
    call.head = head, call.num_rows = num_rows, call.q = at<const float>(q), call.limits = at<const int64_t>(limits);
    call.begin = begin, call.end = end, call.window = window, call.scale = scale, call.softcap = softcap;
    call.phi = phi, call.margin = margin, call.out = at<float>(out), call.den = at<float>(den);
    call.ref = at<float>(ref), call.flag = at<uint8_t>(flag), call.scratch = scratch.data();
    kernels().attend(call);
  });
}

}  // namespace
}  // namespace mxn

NB_MODULE(_C, m) {
  using namespace mxn;
  // A process that ends in the middle of a step keeps its objects: no news for who stopped it.
  nb::set_leak_warnings(false);
  m.doc() = "Native kernels for processors; use mxn.kernels.native";
  m.def("variants", all_variants, "All compiled variants as (name, usable here), the best first");
  m.def("use_variant", use_variant, "name"_a, "Use a variant; empty: the best one");
  m.def("variant", [] { return kernels().name; });
  m.attr("MAX_QUERY_ROWS") = kMaxQueryRows;
  nb::class_<Pool>(m, "Pool")
      .def(nb::init<int, int, bool>(), "num_threads"_a, "spin_us"_a = 200, "is_pinned"_a = false)
      .def_prop_ro("num_threads", &Pool::num_threads)
      .def_prop_ro("num_rests", &Pool::num_rests);
  bind_weight(m);
  bind_layers(m);
  bind_decoder(m);
  bind_ops(m);
  bind_sample(m);
}
