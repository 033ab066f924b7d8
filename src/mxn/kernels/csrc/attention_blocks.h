// Where attention finds the blocks of a cache, and what it fetches beside its work.
#pragma once
#include "common.h"
#include "vec.h"

namespace mxn::MXN_NS {
namespace {

constexpr float kNothing = -3.0e38f;  // score of what a row must not see; exp of it is 0

struct Chunk {
  int64_t begin = 0, end = 0;  // tokens; begin is a multiple of 16
  int blocks() const { return static_cast<int>((end - begin + kLanes - 1) / kLanes); }
};

const uint8_t* block_at(const Attend& c, int64_t token) {
  const CacheShape& s = c.shape;
  return c.cache + s.block_start(c.pages[token / s.page_tokens], token % s.page_tokens, c.head);
}

// What is fetched beside the work on a chunk: the blocks of the chunk behind it, line by line in the order
// in which they lie. Into the second cache and in that order memory answers twice as fast as into the
// first, where two chunks don't fit and few lines can be on their way (docs/log.md). Behind the last
// block of a call come the first ones of the next.
class Ahead {
 public:
  Ahead(const Attend& c, int64_t begin) : bytes_(c.shape.block_bytes()) {
    for (int64_t token = begin + kChunk; token < begin + 2 * kChunk; token += kLanes) {
      if (const uint8_t* block = block_behind(c, token)) blocks_[num_++] = block;
    }
  }
  template <int NUM>
  void fetch() {
    if (at_ >= end_ && !turn()) return;
    for (int i = 0; i < NUM; ++i) prefetch_far(at_ + 64 * i);
    at_ += 64 * NUM;
  }

 private:
  static const uint8_t* block_behind(const Attend& c, int64_t token) {
    if (token < c.end) return block_at(c, token);
    const int64_t last = c.begin + (c.end - c.begin + kLanes - 1) / kLanes * kLanes;
    const int64_t next = c.next_begin + (token > last ? token - last : 0);
    if (next >= c.next_end) return nullptr;
    const CacheShape& s = c.shape;
    return c.cache + s.block_start(c.next_pages[next / s.page_tokens], next % s.page_tokens, c.next_head);
  }
  bool turn() {
    if (next_ == num_) return false;
    at_ = blocks_[next_++];
    end_ = at_ + bytes_;
    return true;
  }

  const uint8_t *at_ = nullptr, *end_ = nullptr;
  const uint8_t* blocks_[kChunk / kLanes];
  int num_ = 0, next_ = 0;
  int64_t bytes_;
};

inline void prefetch_bytes(const uint8_t* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) prefetch_far(p + i);
}

}  // namespace
}  // namespace mxn::MXN_NS
