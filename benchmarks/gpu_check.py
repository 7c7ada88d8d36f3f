"""Are the compiled losses right on this device? Exit 1 if not.

    python benchmarks/gpu_check.py           # 25 s on a GPU; QUICK=1: fewer repeats
    python benchmarks/gpu_check.py --tiny    # two sizes, for compute-sanitizer

Every type, both ways through csrc/loss.cpp, ragged sizes: loss and gradients against float64; equal
bits of repeated calls while memory that nobody has written holds NaN; on a GPU no call may wait for
the device, and a CUDA graph of forward and backward replays on other numbers. DEVICE=cpu as well.
"""

import os
import sys

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # equal bits of cuBLAS

import torch  # noqa: E402
from common import DEVICE, QUICK, capture  # noqa: E402

from mcn_ext import ops, reference  # noqa: E402
from tests.test_loss import contrastive, everything, problem, values  # noqa: E402

TINY = "--tiny" in sys.argv
# N, D, rows and columns of a tile (0: chosen)
SIZES = [(131, 23, 0), (70, 24, 33)]
if not TINY:
    SIZES = [(0, 3, 0), (1, 3, 0), (2, 1, 1), (129, 33, 0), (131, 23, 65), (300, 512, 128)]
    SIZES.append((1000, 13, 0))
LIMITS = {torch.float64: 1e-11, torch.float32: 3e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def cases(n, d, dtype):
    rows, options = problem(n, d, DEVICE, dtype)
    return {
        "a pair": (contrastive(), rows[:2], 0.25),
        "all terms": (everything(**options), rows, 0.25),
        "all terms, dot products": (everything(normalize=False, **options), rows, 4.0),
    }


def without_waiting(*arguments):
    """one_step; an error if it makes the host wait for the GPU."""
    if DEVICE == "cpu":
        return one_step(*arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        return one_step(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def one_step(module, call, rows, temperature):
    """Loss and gradients of the rows; the temperature is a number, so that nothing is copied."""
    leaves = [x.detach().requires_grad_() for x in rows]
    found = call(module, leaves, temperature)
    total = found[0] if isinstance(found, tuple) else found
    return [total.detach(), *torch.autograd.grad(total, leaves, materialize_grads=True)]


def same_bits(call, rows, temperature):
    """Whether repeated calls agree while new memory is filled with NaN."""
    first = values(ops, call, rows, temperature)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        repeats = range(1 if QUICK else 3)
        found = [values(ops, call, rows, temperature) for _ in repeats]
    finally:
        torch.use_deterministic_algorithms(False)
    return all(all(map(torch.equal, first, again)) for again in found)


def check_values(mode, dtype, size, worst):
    """Failures as sentences; notes the largest errors in ``worst``."""
    os.environ["MCN_LOSS_BUDGET"] = str(2**31 if mode == "keep" else 0)
    n, d, ops._tile = size
    for name, (call, rows, temperature) in cases(n, d, dtype).items():
        what = f"{mode}, {str(dtype)[6:]}, N {n}, D {d}, tile {size[2]}, {name}"
        got = without_waiting(ops, call, rows, temperature)
        want = one_step(reference, call, [x.double() for x in rows], temperature)
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            if not w.numel():
                continue
            # Where the exact number is about 0, rounding is relative to what cancels.
            scale = w.abs().max().clamp_min(1 / (temperature * max(n, 1)))
            error = float((g.double() - w).abs().max() / scale)
            key = f"{mode}, {str(dtype)[6:]}, {'gradients' if i else 'loss'}"
            worst[key] = max(worst.get(key, 0.0), error)
            if not error <= LIMITS[dtype]:  # NaN fails
                yield f"{what}, {'gradient' if i else 'loss'}: error {error:.1e}"
        if not TINY and not same_bits(call, rows, temperature):
            yield f"{what}: other bits"


def check_graph(budget):
    """Replays of a CUDA graph of forward and backward give the bits of a call."""
    x, y = (torch.randn(512, 64, device=DEVICE).bfloat16().requires_grad_() for _ in range(2))

    def call():
        loss = ops.contrastive_loss(x, y, budget=budget)
        return loss, *torch.autograd.grad(loss, (x, y))

    graph, replayed = capture(call)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    for _ in range(2):  # a counter that a kernel leaves behind would show in the second
        graph.replay()
    torch.cuda.synchronize()
    if not all(map(torch.equal, replayed, call())):
        yield f"CUDA graph, budget {budget}: other bits"


def main():
    if DEVICE == "cuda" and not ops.has_cuda():
        sys.exit(f"the extension has no CUDA kernels, nothing can be checked: {ops.build_info()}")
    worst, failures = {}, []
    for mode in ("keep", "stream"):
        for dtype in LIMITS:
            for size in SIZES:
                failures += check_values(mode, dtype, size, worst)
    ops._tile = 0
    for key, error in worst.items():
        print(f"{key}: largest error {error:.1e}")
    if DEVICE == "cuda" and not TINY:
        failures += [*check_graph(None), *check_graph(0)]
    print(*(f"FAILED {what}" for what in failures), f"{len(failures)} failures", sep="\n")
    sys.exit(len(failures) > 0)


if __name__ == "__main__":
    main()
