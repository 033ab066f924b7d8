// Where attention finds the blocks of a cache, and which one it fetches beside its work.
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

// The block that is wanted `kAhead` blocks later, fetched line by line beside the work on `token`'s: pages
// lie anywhere and keys and values take turns, so the processor cannot guess. Behind the last block of a
// call come the first ones of the next.
constexpr int64_t kAhead = kChunk / kLanes;

inline const uint8_t* block_ahead(const Attend& c, int64_t token) {
  const CacheShape& s = c.shape;
  const int64_t ahead = token + kAhead * kLanes;
  if (ahead < c.end) return block_at(c, ahead);
  const int64_t last = c.begin + (c.end - c.begin + kLanes - 1) / kLanes * kLanes;
  const int64_t next = c.next_begin + (ahead > last ? ahead - last : 0);
  if (next >= c.next_end) return block_at(c, token);
  return c.cache + s.block_start(c.next_pages[next / s.page_tokens], next % s.page_tokens, c.next_head);
}

inline void prefetch_bytes(const uint8_t* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) prefetch(p + i);
}

}  // namespace
}  // namespace mxn::MXN_NS
