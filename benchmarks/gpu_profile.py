"""Kernels by torch's profiler.

python benchmarks/gpu_profile.py steps [flags of benchmarks/step.py]
python benchmarks/gpu_profile.py once 4096 512        # two calls of the loss, for ncu
"""

import sys
import tempfile
from functools import partial
from pathlib import Path

import step
import torch
from common import DEVICE, QUICK, now
from torch.profiler import profile

import mcn_ext


def loss(n, d):
    x, y = (torch.randn(n, d, device=DEVICE).bfloat16().requires_grad_() for _ in range(2))
    return lambda: mcn_ext.contrastive_loss(x, y).backward()


def repeat(call, times):
    for _ in range(times):
        call()
    now()


def show(title, call, times):
    repeat(call, 2)
    with profile() as found:  # of all there are: the CPU and, with CUDA, the GPU
        repeat(call, times)
    by = "self_device_time_total" if DEVICE == "cuda" else "self_cpu_time_total"
    print(f"\n{title}, {times} calls\n")
    print(found.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=60))


def main():
    what, *rest = sys.argv[1:]
    if what == "once":
        return repeat(loss(*map(int, rest)), 2)
    for size in ((64, 16),) if QUICK else ((4096, 512), (4096, 6144), (32768, 1024)):
        show("contrastive_loss, N {}, D {}".format(*size), loss(*size), 10)
    args = step.arguments(rest)
    with tempfile.TemporaryDirectory() as folder:
        batch, *inputs = step.read(args, Path(folder))
    ours = step.Ours(args, *inputs, step.autocast("bf16" if DEVICE == "cuda" else "fp32"))
    show("training step, AVT", partial(ours.step, step.no_clock, batch), 2)


if __name__ == "__main__":
    main()
