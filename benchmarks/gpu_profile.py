"""Kernels by torch's profiler.

python benchmarks/gpu_profile.py loss step [flags of benchmarks/step.py]
python benchmarks/gpu_profile.py once 4096 512        # two calls of the loss, for ncu
"""

import os
import sys
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import mcn_ext
from benchmarks import step

DEVICE, QUICK = os.environ.get("DEVICE", "cuda"), bool(os.environ.get("QUICK"))


def wait():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def loss(n, d):
    x, y = (torch.randn(n, d, device=DEVICE).bfloat16().requires_grad_() for _ in range(2))

    def call(times):
        for _ in range(times):
            mcn_ext.contrastive_loss(x, y).backward()
        wait()

    return call


def show(title, call, times):
    call(2)
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (DEVICE == "cuda")
    with profile(activities=kinds) as found:
        call(times)
    by = "self_device_time_total" if DEVICE == "cuda" else "self_cpu_time_total"
    print(f"\n{title}, {times} calls\n")
    print(found.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=60))


def main():
    what, *rest = sys.argv[1:]
    if what == "once":
        return loss(*map(int, rest))(2)
    for size in ((64, 16),) if QUICK else ((4096, 512), (4096, 6144), (32768, 1024)):
        show("contrastive_loss, N {}, D {}".format(*size), loss(*size), 10)
    args = step.arguments(rest[1:] + ["--device", DEVICE])
    with tempfile.TemporaryDirectory() as folder:
        clips = step.Clips(args, Path(folder))
        ours, batch = step.both(args, clips, Path(folder))["ours"](), clips.read()
        show("training step, AVT", lambda n: step.in_a_row(ours, batch, args.device, n), 2)


if __name__ == "__main__":
    main()
