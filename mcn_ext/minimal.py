"""Width-9 convolutions with two thirds of the products, for CPUs.

Two neighbouring outputs of a width-3 convolution take 4 products instead of 6 (minimal filtering
F(2, 3): Winograd 1980; Lavin & Gray 2016). With inputs d0 to d3 and taps g0, g1, g2::

    m0 = (d0 - d2) g0                     m1 = (d1 + d2) (g0 + g1 + g2) / 2
    m3 = (d1 - d3) g2                     m2 = (d2 - d1) (g0 - g1 + g2) / 2
    y0 = m0 + m1 + m2                     y1 = m1 - m2 - m3

Nine taps are three such groups, whose products add up before the last line. A product here is a
matrix product (frames, C_in) (C_in, C_out); gradients of inputs are the same convolution of flipped
taps, those of weights the same four products with outputs and weights changing places.

Nothing is lost by it: factors are 1 and 1/2, and sums are of C_in terms instead of 9 C_in. In fp32
the error is a quarter of that of oneDNN's direct convolution (tests/test_frames.py).
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

LEAST = 64  # channels, of both sides: with fewer, what is saved in products goes into sums
_BLOCK = 2**18  # numbers of a block of frames: its sums stay in the processor's cache
_direct = False  # see direct()


@contextlib.contextmanager
def direct():
    """Within, convolutions are direct ones, as on a GPU: to count what they ask for."""
    global _direct
    before, _direct = _direct, True
    try:
        yield
    finally:
        _direct = before


def pays(rows: Tensor, weight: Tensor, stride: int) -> bool:
    """Whether :func:`convolve` is faster than a direct convolution, and as exact."""
    few, many = sorted(weight.shape[:2])
    return (
        rows.device.type == "cpu"
        and rows.dtype == weight.dtype == torch.float32
        and stride == 1
        and few >= LEAST
        and not _direct
        and 2 * len(rows) >= many
    )  # else the taps' sums cost what is saved


def _blocks(lines: Tensor):
    """(slice of outputs, their number by two, the sums of the inputs that they see)."""
    n = len(lines) - 8
    step = max(_BLOCK // lines.shape[1], 256) // 2 * 2 * torch.get_num_threads()
    for lo in range(0, n, step):
        out = slice(lo, min(lo + step, n))
        x = lines[lo : out.stop + 8]
        # By m0, m1, m2, m3: which sum, from where on.
        outer, plus, minus = x[:-2] - x[2:], x[:-1] + x[1:], x[1:] - x[:-1]
        yield out, (out.stop - lo) // 2, ((outer, 0), (plus, 1), (minus, 1), (outer, 1))


def _rows(side: tuple[Tensor, int], group: int, n: int) -> Tensor:
    sums, begin = side
    return sums[begin + 3 * group : begin + 3 * group + 2 * n - 1 : 2]


def _taps(weight: Tensor) -> list[Tensor]:
    """The factors of m0, m1, m2, m3 (3 groups, C_out, C_in), the last with its sign turned."""
    g = weight.flatten(1).view(-1, 9).t().contiguous().view(3, 3, *weight.shape[:2])
    half, middle = (g[:, 0] + g[:, 2]) / 2, g[:, 1] / 2
    return [g[:, 0], half + middle, half - middle, -g[:, 2]]


def _convolve(lines: Tensor, taps: list[Tensor]) -> Tensor:
    """``taps`` (3, C_in, C_out) each."""
    y = lines.new_empty(len(lines) - 8, taps[0].shape[2])
    for out, n, sides in _blocks(lines):
        even, odd = y[out].view(n, 2, -1).unbind(1)
        inner = []
        for m in (1, 2):
            inner.append(torch.mm(_rows(sides[m], 0, n), taps[m][0]))
            for group in (1, 2):
                inner[-1].addmm_(_rows(sides[m], group, n), taps[m][group])
        torch.add(*inner, out=even)
        torch.sub(*inner, out=odd)
        for group in range(3):
            even.addmm_(_rows(sides[0], group, n), taps[0][group])
            odd.addmm_(_rows(sides[3], group, n), taps[3][group])
    return y


def convolve(lines: Tensor, weight: Tensor) -> Tensor:
    """lines (4 + n + 4, C_in), n even, weight (C_out, C_in, 1, 9) -> (n, C_out)::

    out[t] = sum_i lines[t + i] weight[:, :, 0, i]^T
    """
    return _convolve(lines, [factor.transpose(1, 2) for factor in _taps(weight)])


def input_gradient(grad_lines: Tensor, weight: Tensor) -> Tensor:
    """grad_lines (4 + n + 4, C_out), zeros at both ends, -> gradient of the n inputs (n, C_in)."""
    first, plus, minus, last = (factor.flip(0) for factor in _taps(weight))
    return _convolve(grad_lines, [-last, plus, minus, -first])  # of the taps in reverse


def weight_gradient(lines: Tensor, grad: Tensor) -> Tensor:
    """lines as of :func:`convolve`, grad (n, C_out) -> (C_out, C_in, 1, 9)."""
    d_taps = lines.new_zeros(4, 3, grad.shape[1], lines.shape[1])
    for out, n, sides in _blocks(lines):
        even, odd = grad[out].view(n, 2, -1).unbind(1)
        for m, d in enumerate((even, even + odd, even - odd, odd)):
            for group in range(3):
                d_taps[m, group].addmm_(d.t(), _rows(sides[m], group, n))
    first, plus, minus, last = d_taps
    half, middle = (plus + minus) / 2, (plus - minus) / 2
    d_g = torch.stack([first + half, middle, half - last], dim=1)  # (group, tap, C_out, C_in)
    return d_g.flatten(0, 1).permute(1, 2, 0)[:, :, None].contiguous()
