// What this machine can do at most, with nothing in the way: read bandwidth, int8 dot products and
// fp32 multiply-adds on all threads that are asked for. Compiled by limits.py with -march=native.
// Prints one line: GB/s, int8 TOPS (0: no VNNI), fp32 TFLOPS. An add and a multiply are two.
#include <immintrin.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define MAX_THREADS 256
static int num_threads;
static double seconds_each;
static char *memory;
static size_t memory_bytes;
static pthread_barrier_t barrier;
static volatile int64_t sink;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

// Bytes read by one thread from its part of the memory, over and over until the time is up.
static double read_part(int thread) {
  size_t part = memory_bytes / num_threads / 512 * 512;
  const char *from = memory + part * thread;
  double done = 0, end = now() + seconds_each;
  int64_t sum = 0;
  do {
    for (size_t start = 0; start < part; start += 16 << 20) {
      size_t stop = start + (16 << 20) < part ? start + (16 << 20) : part;
#ifdef __AVX512F__
      __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
      for (size_t i = start; i < stop; i += 256) {
        a = _mm512_or_si512(a, _mm512_loadu_si512(from + i));
        b = _mm512_or_si512(b, _mm512_loadu_si512(from + i + 64));
        c = _mm512_or_si512(c, _mm512_loadu_si512(from + i + 128));
        d = _mm512_or_si512(d, _mm512_loadu_si512(from + i + 192));
      }
      sum += _mm512_reduce_or_epi64(_mm512_or_si512(_mm512_or_si512(a, b), _mm512_or_si512(c, d)));
#else
      for (size_t i = start; i < stop; i += 8) sum |= *(const int64_t *)(from + i);
#endif
      done += stop - start;
      if (now() >= end) break;
    }
  } while (now() < end);
  sink += sum;
  return done;
}

// Twelve chains hide the latency of the instruction. Each is a variable of its own, because gcc
// keeps an array in memory here; the empty asm forbids it to merge or move the steps.
#define CHAINS(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)
#define NUM_CHAINS 12
#define ROUNDS 4096

static double int8_ops(void) {
#ifdef __AVX512VNNI__
  __m512i x = _mm512_set1_epi8(3), y = _mm512_set1_epi8(5);
#define INIT(i) __m512i a##i = _mm512_setzero_si512();
#define STEP(i) a##i = _mm512_dpbusd_epi32(a##i, x, y); __asm__ volatile("" : "+v"(a##i));
#define SINK(i) sink += _mm512_reduce_add_epi32(a##i);
  CHAINS(INIT)
  double done = 0, end = now() + seconds_each;
  do {
    for (int r = 0; r < ROUNDS; r++) { CHAINS(STEP) }
    done += 128.0 * NUM_CHAINS * ROUNDS;
  } while (now() < end);
  CHAINS(SINK)
  return done;
#undef INIT
#undef STEP
#undef SINK
#else
  return 0;
#endif
}

#if defined(__AVX512F__)
typedef __m512 Vector;
#define SET _mm512_set1_ps
#define FMA _mm512_fmadd_ps
#define REGISTER "+v"
#elif defined(__FMA__)
typedef __m256 Vector;
#define SET _mm256_set1_ps
#define FMA _mm256_fmadd_ps
#define REGISTER "+x"
#else
#error "no fused multiply-add: this processor is too old for the limits to mean much"
#endif

static double fp32_ops(void) {
  Vector x = SET(0.5f);
#define INIT(i) Vector a##i = SET(1.0f);
#define STEP(i) a##i = FMA(a##i, x, x); __asm__ volatile("" : REGISTER(a##i));
  CHAINS(INIT)
  double done = 0, end = now() + seconds_each;
  do {
    for (int r = 0; r < ROUNDS; r++) { CHAINS(STEP) }
    done += 2.0 * (sizeof(Vector) / sizeof(float)) * NUM_CHAINS * ROUNDS;
  } while (now() < end);
  Vector copies[1];
#define COPY(i) copies[0] = a##i; sink += (int64_t)((float *)copies)[0];
  CHAINS(COPY)
  return done;
}

static double rates[3][MAX_THREADS];

static void *work(void *argument) {
  int thread = (int)(intptr_t)argument;
  for (int what = 0; what < 3; what++) {
    pthread_barrier_wait(&barrier);
    double start = now();
    double done = what == 0 ? read_part(thread) : what == 1 ? int8_ops() : fp32_ops();
    rates[what][thread] = done / (now() - start);
  }
  return NULL;
}

int main(int count, char **words) {
  if (count != 4) return 2;  // threads, MiB, seconds of each measurement
  num_threads = atoi(words[1]);
  memory_bytes = (size_t)atol(words[2]) << 20;
  seconds_each = atof(words[3]);
  if (num_threads < 1 || num_threads > MAX_THREADS) return 2;
  memory = aligned_alloc(1 << 21, memory_bytes);
  if (!memory) return 3;
  memset(memory, 1, memory_bytes);
  pthread_barrier_init(&barrier, NULL, num_threads);
  pthread_t threads[MAX_THREADS];
  for (int i = 0; i < num_threads; i++)
    pthread_create(&threads[i], NULL, work, (void *)(intptr_t)i);
  for (int i = 0; i < num_threads; i++) pthread_join(threads[i], NULL);
  double sums[3] = {0};
  for (int what = 0; what < 3; what++)
    for (int i = 0; i < num_threads; i++) sums[what] += rates[what][i];
  printf("%.3f %.4f %.4f\n", sums[0] / 1e9, sums[1] / 1e12, sums[2] / 1e12);
  return 0;
}
