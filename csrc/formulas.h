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

// log(1 + e) for e in [0, 1]: 2 atanh(e / (2 + e)), its series; written so that it vectorises.
MCN_INLINE float log1p_unit(float e) {
  const float t = e / (2.0f + e), s = t * t;
  float p = 1.0f / 15;
  p = p * s + 1.0f / 13;
  p = p * s + 1.0f / 11;
  p = p * s + 1.0f / 9;
  p = p * s + 1.0f / 7;
  p = p * s + 1.0f / 5;
  p = p * s + 1.0f / 3;
  return 2.0f * t * (p * s + 1.0f);
}
MCN_INLINE double log1p_unit(double e) { return std::log1p(e); }

// An element of the sigmoid loss, log(1 + exp(x)), and its derivative; e = exp(-|x|).
template <typename A>
struct Element {
  A loss, slope;
  MCN_INLINE Element(A x, A e) {
    const A inverse = A(1) / (A(1) + e);
    loss = (x > A(0) ? x : A(0)) + log1p_unit(e);
    slope = x > A(0) ? inverse : e * inverse;
  }
};

// Largest power of two p with p * value < 1, at most 2^100 (value <= 0 or not finite: 1).
MCN_INLINE double power_below_one(double value) {
  if (!(value > 0) || value > 1e300) return 1.0;
  int exponent = 0;
  std::frexp(value, &exponent);  // value = fraction * 2^exponent, fraction in [0.5, 1)
  return std::ldexp(1.0, exponent < -100 ? 100 : -exponent);
}

// The losses of reference.py's contrastive_loss, in ops.py's order.
enum class Kind : int64_t { kSoftmax, kDcl, kRince, kSigmoid };
struct Form {
  Kind kind = Kind::kSoftmax;
  double q = 1, log_lambda = 0;  // of RINCE
};
constexpr double kLargestExponent = 60;  // of RINCE; a row beyond it has no gradient

// One direction of a row, from its sums over the others and over its positives: its loss, and its
// gradient with respect to every logit z, that is
//   of one of the others    exp(z - top - rest)              sigmoid: rest * sigmoid(z)
//   of a positive          -exp(z - near_top - near_rest)    sigmoid: -rest * sigmoid(-z)
// top and rest are kept apart: added up they would lose `rest` where logits are 1e9.
template <typename A>
struct Direction {
  double loss = 0;
  double pull = 0;    // -gradient of the partner, the positive that every row has
  double excess = 0;  // the gradients of all logits, summed: 0 unless RINCE or sigmoid
  double bound = 0;   // the largest gradient of a logit but the partner's, at most
  A top, near_top;
  A rest = -lowest<A>(), near_rest = -lowest<A>();  // +inf: no gradient

  // near: positives but the partner. Sigmoid: others.sum is the sum of the losses of all entries
  // but the partner, near.sum that of their gradients.
  MCN_INLINE Direction(const Form& form, LogSum<A> others, LogSum<A> near, A partner, A weight)
      : top(partner), near_top(partner) {
    if (form.kind == Kind::kSigmoid) top = rest = 0;
    if (weight == A(0)) return;
    if (form.kind == Kind::kSigmoid) {
      const double half = 0.5 * weight;  // the mean of both directions
      loss = half * (others.sum + softplus(-double(partner)));
      pull = half * sigmoid(-double(partner));
      excess = half * near.sum - pull;
      bound = half * (others.sum < 1 ? double(others.sum) : 1.0);  // sigmoid(z) < softplus(z)
      rest = A(half);
      return;
    }
    const A nearest = near.max;
    near.merge(partner, 1);  // from here on the partner is among them
    if (others.sum == A(0)) return;  // nothing to be told from
    const double of_near = std::log(double(near.sum)), of_others = std::log(double(others.sum));
    const double gap = (double(others.max) - near.max) + (of_others - of_near);
    // With o and s the log-sums of the others and of the positives: slope = log dL/do and
    // pulled = log -dL/ds.
    double slope = -softplus(-gap), pulled = slope;
    loss = softplus(gap);
    if (form.kind == Kind::kDcl) {
      loss = gap, slope = pulled = 0;
    } else if (form.kind == Kind::kRince) {
      // log of the powers of the positives' sum, and of lambda times the sum of all. For q near 0
      // or lambda near 1 these are nearly equal: their difference is then exact as expm1 alone.
      const double log_positive = form.q * (near.max + of_near);
      const double more = form.q * (form.log_lambda + loss), log_all = log_positive + more;
      const auto power = [](double log) {
        return std::exp(log > kLargestExponent ? kLargestExponent : log);
      };
      if (log_positive > kLargestExponent || log_all > kLargestExponent) {
        slope = pulled = lowest<double>();
      } else {
        slope = log_all - softplus(-gap);
        pulled = log_positive + std::log(-std::expm1(more - loss));
      }
      loss =
          more < 1 ? power(log_positive) * std::expm1(more) : power(log_all) - power(log_positive);
      if (slope > lowest<double>()) excess = weight * loss;
      loss /= form.q;
    }
    const double log_weight = std::log(double(weight));
    loss *= weight;
    top = others.max, rest = A(of_others - slope - log_weight);
    near_top = near.max, near_rest = A(of_near - pulled - log_weight);
    pull = std::exp((double(partner) - near_top) - (of_near - pulled - log_weight));
    const double mate = std::exp(double(nearest) - near_top - near_rest);
    bound = std::exp(-double(rest));
    if (mate > bound) bound = mate;
  }
};

// A term's sums over some rows.
struct Sums {
  double loss = 0, count = 0;       // of the rows that are there
  double excess = 0, excess_z = 0;  // Directions', and times the partner's logit
  double bound = 0;                 // the largest of Directions'
  double broken = 0;                // 1: a value is not finite

  MCN_INLINE void merge(const Sums& s) {
    loss += s.loss, count += s.count, excess += s.excess, excess_z += s.excess_z;
    bound = s.bound > bound ? s.bound : bound, broken = s.broken > broken ? s.broken : broken;
  }
};

// What becomes of a term's mean over all ranks' rows.
template <typename A>
struct Conclusion {
  double weight, report;  // of the mean in the total, and in the loss that is reported
  A *total, *reported;    // scalars; `reported` is added to
  bool first;             // of the terms: total is written, not added to
  double* scalars;        // gradients of temperature and bias over all terms; added to
};

// All ranks' sums into a mean, and what every element of the gradient is multiplied by.
template <typename A>
MCN_INLINE void conclude_sums(const Sums* sums, int64_t ranks, double temperature, A* factor,
                              const Conclusion<A>& to) {
  Sums all;
  for (int64_t r = 0; r < ranks; ++r) all.merge(sums[r]);
  // NaN for all, in the gradients as well, also where a dot product of finite rows overflowed.
  const double mean = all.broken > 0 || all.loss != all.loss
                          ? std::numeric_limits<double>::quiet_NaN()
                          : 1.0 / (all.count > 1 ? all.count : 1.0);
  factor[0] = A(to.weight * mean / temperature);
  factor[1] = A(512 * power_below_one(all.bound));
  *to.reported += A(to.report * (all.loss * mean));
  *to.total = (to.first ? A(0) : *to.total) + A(to.weight * (all.loss * mean));
  to.scalars[0] -= to.weight * mean / temperature * all.excess_z / ranks;  // ranks add theirs up
  to.scalars[1] += to.weight * mean * all.excess / ranks;
}

}  // namespace mcn
