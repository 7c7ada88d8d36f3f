// The formulas of the losses, once, for the CPU and the GPU kernels.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#ifdef __CUDACC__
#define MCN_INLINE __host__ __device__ __forceinline__
#else
#define MCN_INLINE inline __attribute__((always_inline))
#endif

namespace mcn {

// |x| at or below it counts as zero: no direction, no gradient. (mcn_ext/reference.py has the
// same.)
constexpr double kEps = 1e-12;

template <typename A>
MCN_INLINE A lowest() {
  return -std::numeric_limits<A>::infinity();
}

// Sum of exponentials as (largest logit, sum of exp(logit - largest)); nothing yet is (-inf, 0).
template <typename A>
struct LogSum {
  A max = lowest<A>();
  A sum = 0;

  MCN_INLINE void merge(A other_max, A other_sum) {
    const A top = max > other_max ? max : other_max;
    if (top == lowest<A>()) {  // both empty: exp(-inf - -inf) would be NaN
      sum += other_sum;        // 0, or the NaN of a row that must not be hidden
      return;
    }
    sum = sum * std::exp(max - top) + other_sum * std::exp(other_max - top);
    max = top;
  }
};

// log(1 + exp(others - positive)) where `others` is the log-sum-exp without
// the positive. The same number as lse - positive, which cancels to nothing when the loss is near
// 0.
template <typename A>
MCN_INLINE A softplus(A gap) {
  return gap > A(0) ? gap + std::log1p(std::exp(-gap)) : std::log1p(std::exp(gap));
}

// Its derivative, the weight with which the row is pulled to its positive.
template <typename A>
MCN_INLINE A sigmoid(A gap) {
  const A e = std::exp(gap > A(0) ? -gap : gap);
  return gap > A(0) ? A(1) / (A(1) + e) : e / (A(1) + e);
}

// Largest power of two p with p * value < 1, at most 2^100 (value <= 0 or not finite: 1).
MCN_INLINE double power_below_one(double value) {
  if (!(value > 0) || value > 1e300) return 1.0;
  int exponent = 0;
  std::frexp(value, &exponent);  // value = fraction * 2^exponent, fraction in [0.5, 1)
  return std::ldexp(1.0, exponent < -100 ? 100 : -exponent);
}

// One direction of a row, from the log-sum of the others and the logit of its positive. The row's
// log-sum with the positive is top + rest: added up they would lose `rest` where logits are 1e9.
template <typename A>
struct Direction {
  A loss, pull, top, rest;

  MCN_INLINE Direction(A max, A sum, A positive) : loss(0), pull(0), top(positive), rest(0) {
    if (sum == A(0)) return;  // no others
    const A gap = (max - positive) + std::log(sum);
    loss = softplus(gap);
    pull = sigmoid(gap);
    rest = loss;
    if (max > positive) top = max, rest = std::log(sum) + softplus(-gap);
  }
};

// A term's loss over some rows.
struct Sums {
  double loss = 0, count = 0;  // of the rows that are there
  double bound = 0;            // the largest softmax weight of a logit that is no positive
  double broken = 0;           // 1: a value is not finite
};

// What becomes of a term's mean over all ranks' rows.
template <typename A>
struct Conclusion {
  double weight, report;  // of the mean in the total, and in the loss that is reported
  A *total, *reported;    // scalars; `reported` is added to
  bool first;             // of the terms: total is written, not added to
};

// All ranks' sums (ranks, 4) into a mean, and what every element of the gradient is multiplied by.
template <typename A>
MCN_INLINE void conclude_sums(const double* sums, int64_t ranks, double temperature, A* factor,
                              const Conclusion<A>& to) {
  Sums all;
  for (int64_t r = 0; r < ranks; ++r) {
    const double* s = sums + 4 * r;
    all.loss += s[0], all.count += s[1];
    all.bound = s[2] > all.bound ? s[2] : all.bound;
    all.broken = s[3] > all.broken ? s[3] : all.broken;
  }
  // NaN for all, in the gradients as well, also where a dot product of finite rows overflowed.
  const double mean = all.broken > 0 || all.loss != all.loss
                          ? std::numeric_limits<double>::quiet_NaN()
                          : 1.0 / (all.count > 1 ? all.count : 1.0);
  factor[0] = A(to.weight * mean / temperature);
  factor[1] = A(512 * power_below_one(all.bound));
  *to.reported += A(to.report * (all.loss * mean));
  *to.total = (to.first ? A(0) : *to.total) + A(to.weight * (all.loss * mean));
}

}  // namespace mcn
