"""What the machine can do, and experiments that decide what is built next.

    python benchmarks/gpu_experiments.py machine --out FILE.json     # bytes and products a second
    python benchmarks/gpu_experiments.py all --out FILE.json
    python benchmarks/gpu_experiments.py k-means norms --out FILE.json

nccl: the extension's collectives from C++, a group of one rank. k-means: a refit by block size.
norms: BatchNorm, addition and ReLU, compiled or not. convolutions: DAVEnet's layers by memory
layout. DEVICE=cpu and QUICK=1 run them at sizes that say nothing.
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from mcn_ext import clustering, distributed, ops

DEVICE, QUICK = os.environ.get("DEVICE", "cuda"), bool(os.environ.get("QUICK"))


def wait():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def milliseconds(n, call, *arguments, **options):
    for _ in range(2):
        call(*arguments, **options)
    wait()
    begin = time.perf_counter()
    for _ in range(n):
        call(*arguments, **options)
    wait()
    return 1e3 * (time.perf_counter() - begin) / n


def normal(*size, dtype=torch.bfloat16):
    return torch.randn(*size, device=DEVICE).to(dtype)


def machine(note):
    """Its parts, a copy's bandwidth, and the losses' matrix products."""
    gib = 2.0**30
    note(
        "machine",
        {
            "torch": torch.__version__,
            "CUDA": torch.version.cuda,
            "python": sys.version.split()[0],
            "cpus": os.cpu_count(),
            "/dev/shm free, GiB": shutil.disk_usage("/dev/shm").free / gib,
        },
    )
    if DEVICE == "cuda":
        p = torch.cuda.get_device_properties(0)
        note("gpu", {"name": p.name, "GiB": p.total_memory / gib, "SMs": p.multi_processor_count})
    x = torch.empty(2**20 if QUICK else 2**30, dtype=torch.int32, device=DEVICE).random_()
    y = torch.empty_like(x)
    note("copy, TB/s", 2 * x.nbytes / milliseconds(5, y.copy_, x) / 1e9)
    del x, y
    size = 256 if QUICK else 4096
    for d in (64,) if QUICK else (512, 1024, 6144):
        a, b, p = normal(size, d), normal(size, d), normal(size, size)
        ms = {
            "S = x y^T, bf16": milliseconds(10, torch.mm, a, b.t()),
            "P y, bf16": milliseconds(10, torch.mm, p, b),
        }
        if DEVICE == "cuda":  # CPUs lack these
            s, g = (torch.zeros(size, n, device=DEVICE) for n in (size, d))
            for name, out, left, right in (
                ("S", s, a, b.t()),
                ("P y", g, p, b),
                ("P^T x", g, p.t(), a),
            ):
                ms[f"{name}, fp32 out"] = milliseconds(
                    10, torch.mm, left, right, out_dtype=torch.float32, out=out
                )
            ms["P y, added to fp32"] = milliseconds(
                10, torch.ops.aten.addmm.dtype_out, g, p, b, torch.float32, out=g
            )
        note(
            f"N {size}, D {d}, TFLOP/s",
            {name: 2 * size * size * d / t / 1e9 for name, t in ms.items()},
        )


def nccl(note):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29577", RANK="0", WORLD_SIZE="1")
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo", rank=0, world_size=1)
    x, y = (normal(200, 33, dtype=torch.float32).requires_grad_() for _ in range(2))
    alone = ops.contrastive_loss(x, y)
    wanted = torch.autograd.grad(alone, (x, y))
    of = distributed.Ranks.of
    distributed.Ranks.of = classmethod(lambda cls, group: cls(group))  # a group of one counts, too
    try:
        for budget in (None, 0):
            loss = ops.contrastive_loss(x, y, group=dist.group.WORLD, budget=budget)
            found = torch.autograd.grad(loss, (x, y))
            note(
                f"collectives over {dist.get_backend()}, budget {budget}: differences",
                {
                    "loss": abs(float((loss - alone).detach())),
                    "gradients": max(
                        float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True)
                    ),
                },
            )
    finally:
        distributed.Ranks.of = of
        dist.destroy_process_group()


def k_means(note):
    n, d, k = (2048, 32, 8) if QUICK else (81920, 6144, 256)
    g = {"generator": torch.Generator(DEVICE).manual_seed(0), "device": DEVICE}
    centres = F.normalize(torch.randn(2 * k, d, **g))

    def queue():
        return centres[torch.randint(2 * k, (n,), **g)] + torch.randn(n, d, **g) / d**0.5

    start, x, first = clustering.spherical_kmeans(queue(), k)[0], queue(), None
    chosen = clustering.BLOCK
    for block in (1024, 4096, 16384, 65536):
        clustering.BLOCK = dict.fromkeys(chosen, block)
        labels = clustering.spherical_kmeans(x, k, init=start)[1]
        first = labels if first is None else first
        note(
            f"k-means refit, {n} x {d}, K {k}, block {block}",
            {
                "ms": milliseconds(2, clustering.spherical_kmeans, x, k, init=start),
                "labels of block 1024": bool(torch.equal(labels, first)),
            },
        )
    clustering.BLOCK = chosen


def norms(note):
    n, c = (256, 16) if QUICK else (2**21, 128)
    x, z, gradient = (normal(n, c) for _ in range(3))
    norm = nn.BatchNorm1d(c).to(DEVICE)
    leaves = (x.requires_grad_(), z.requires_grad_(), norm.weight, norm.bias)

    def plain(x, z):
        return torch.relu(norm(x) + z)

    for name, call in {"eager": plain, "compiled": torch.compile(plain)}.items():
        if name == "compiled" and QUICK:
            continue

        def both_ways(call=call):
            return torch.autograd.grad(call(x, z), leaves, gradient)

        note(f"BatchNorm, addition, ReLU, {n} x {c}, {name}, ms", milliseconds(5, both_ways))


def convolutions(note):
    clips = 2 if QUICK else 1024
    for a, b, frames, stride in (
        (128, 128, 1000, 2),
        (128, 128, 500, 1),
        (128, 256, 500, 2),
        (256, 256, 250, 1),
        (256, 512, 250, 2),
        (512, 512, 125, 1),
        (512, 1024, 125, 2),
        (1024, 1024, 63, 1),
    ):
        if QUICK:
            a, b, frames = a // 16, b // 16, frames // 10
        gflop = 2 * clips * -(-frames // stride) * a * b * 9 / 1e9
        for layout in (
            "(B, C, 1, T) channels_last",
            "(B, C, 1, T) channels_last, benchmark",
            "(B, C, T, 1) channels_last",
            "(B, C, 1, T) contiguous",
        ):
            torch.backends.cudnn.benchmark = "benchmark" in layout
            tall, memory = "T, 1" in layout, torch.channels_last
            if "contiguous" in layout:
                memory = torch.contiguous_format
            shape, kernel = ((frames, 1), (9, 1)) if tall else ((1, frames), (1, 9))
            step, pad = ([stride, 1], [4, 0]) if tall else ([1, stride], [0, 4])
            x = normal(clips, a, *shape).contiguous(memory_format=memory)
            w = normal(b, a, *kernel).contiguous(memory_format=memory)
            options = {"stride": step, "padding": pad}
            g = torch.randn_like(F.conv2d(x, w, **options))
            ms = {"forward": milliseconds(3, F.conv2d, x, w, **options)}
            for name, mask in (("input", [True, False, False]), ("weight", [False, True, False])):
                ms[f"gradient of the {name}"] = milliseconds(
                    3,
                    torch.ops.aten.convolution_backward,
                    g,
                    x,
                    w,
                    None,
                    step,
                    pad,
                    [1, 1],
                    False,
                    [0, 0],
                    1,
                    mask,
                )
            note(
                f"{a} -> {b}, {frames} frames, stride {stride}, {layout}, TFLOP/s",
                {name: gflop / t for name, t in ms.items()},
            )
    torch.backends.cudnn.benchmark = False


EXPERIMENTS = {
    "machine": machine,
    "nccl": nccl,
    "k-means": k_means,
    "norms": norms,
    "convolutions": convolutions,
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", choices=("all", *EXPERIMENTS))
    parser.add_argument("--out", type=Path, required=True)
    args, found, failed = parser.parse_args(), {}, False

    def note(name, value):
        if isinstance(value, dict):
            value = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in value.items()}
        found[name] = value
        print(f"{name}: {value}", flush=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")  # the next may be stopped

    for name in list(EXPERIMENTS)[1:] if args.names == ["all"] else args.names:
        try:
            EXPERIMENTS[name](note)
        except Exception as error:  # an experiment that fails is a result; the others run
            note(name, f"{type(error).__name__}: {str(error)[:300]}")
            failed = True
    sys.exit(failed)


if __name__ == "__main__":
    main()
