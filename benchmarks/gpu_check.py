"""Are the compiled losses right on this device? Exit 1 if not.

    python benchmarks/gpu_check.py           # 25 s on a GPU; QUICK=1: fewer sizes
    python benchmarks/gpu_check.py --tiny    # two sizes, for compute-sanitizer

Every type, both ways through csrc/loss.cpp, ragged sizes: loss and gradients against float64; equal
bits of repeated calls while memory that nobody has written holds NaN; on a GPU no call may wait for
the device, and a CUDA graph of forward and backward replays on other numbers. DEVICE=cpu as well.
"""

import os
import sys
import time

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # equal bits of cuBLAS

import torch  # noqa: E402

from mcn_ext import ops, reference  # noqa: E402
from tests.test_loss import contrastive, everything, problem, values  # noqa: E402

DEVICE, TINY = os.environ.get("DEVICE", "cuda"), "--tiny" in sys.argv
SIZES = (
    [(131, 23, 0), (70, 24, 33)]
    if TINY
    else [  # N, D, rows and columns of a tile (0: chosen)
        (0, 3, 0),
        (1, 3, 0),
        (2, 1, 1),
        (129, 33, 0),
        (131, 23, 65),
        (300, 512, 128),
        (1000, 13, 0),
    ]
)
LIMITS = {torch.float64: 1e-11, torch.float32: 3e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def cases(n, d, dtype):
    rows, options = problem(n, d, DEVICE, dtype)
    return {
        "a pair": (contrastive(), rows[:2], 0.25),
        "all terms": (everything(**options), rows, 0.25),
        "all terms, dot products": (everything(normalize=False, **options), rows, 4.0),
    }


def without_waiting(call, *arguments):
    """An error if the call makes the host wait for the GPU."""
    if DEVICE == "cpu":
        return call(*arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        return call(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def one_step(module, call, rows, temperature):
    """Loss and gradients of the rows; the temperature is a number, so that nothing is copied."""
    leaves = [x.detach().requires_grad_() for x in rows]
    found = call(module, leaves, temperature)
    total = found[0] if isinstance(found, tuple) else found
    return [total.detach(), *torch.autograd.grad(total, leaves, materialize_grads=True)]


def check_values(worst):
    """Notes the largest errors in ``worst``; the number of failures."""
    failures = 0
    for mode, dtype, size in ((m, t, s) for m in ("keep", "stream") for t in LIMITS for s in SIZES):
        os.environ["MCN_LOSS_BUDGET"] = str(2**31 if mode == "keep" else 0)
        n, d, ops._tile = size
        for name, (call, rows, temperature) in cases(n, d, dtype).items():
            what = f"{mode}, {str(dtype)[6:]}, N {n}, D {d}, tile {size[2]}, {name}"
            got = without_waiting(one_step, ops, call, rows, temperature)
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
                    failures += 1
                    print(f"FAILED {what}, {'gradient' if i else 'loss'}: error {error:.1e}")
            if not TINY:
                first = values(ops, call, rows, temperature)
                torch.use_deterministic_algorithms(True)  # fills new memory with NaN
                for _ in range(1 if os.environ.get("QUICK") else 3):
                    again = values(ops, call, rows, temperature)
                    if not all(map(torch.equal, first, again)):
                        failures += 1
                        print(f"FAILED {what}: other bits")
                torch.use_deterministic_algorithms(False)
    ops._tile = 0
    return failures


def check_graph(budget):
    """1 if a CUDA graph of forward and backward does not give the bits of a call, else 0."""
    x, y = (torch.randn(512, 64, device=DEVICE).bfloat16().requires_grad_() for _ in range(2))

    def call():
        loss = ops.contrastive_loss(x, y, budget=budget)
        return loss, *torch.autograd.grad(loss, (x, y))

    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        replayed = call()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    for _ in range(2):  # a counter that a kernel leaves behind would show in the second
        graph.replay()
    torch.cuda.synchronize()
    same = all(map(torch.equal, replayed, call()))
    print(f"CUDA graph, budget {budget}: {'equal bits' if same else 'FAILED'}")
    return int(not same)


def main():
    if DEVICE == "cuda" and not ops.has_cuda():
        sys.exit(f"the extension has no CUDA kernels, nothing can be checked: {ops.build_info()}")
    begin, worst = time.time(), {}
    failures = check_values(worst)
    for key, error in worst.items():
        print(f"{key}: largest error {error:.1e}")
    if DEVICE == "cuda" and not TINY:
        failures += sum(check_graph(budget) for budget in (None, 0))
    print(f"{failures} failures, {time.time() - begin:.0f} s")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
