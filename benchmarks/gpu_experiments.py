"""What the machine can do, and experiments that decide what is built next.

    python benchmarks/gpu_experiments.py machine                         # bytes, products a second
    python benchmarks/gpu_experiments.py nccl k_means convolutions

nccl: the extension's collectives from C++, a group of one rank. k_means: kmeans.py. convolutions:
DAVEnet's layers by memory layout. What compiled BatchNorm, addition and ReLU save is in step.py:
its plain step in channels_last, compiled or not. DEVICE=cpu and QUICK=1 run them at sizes that say
nothing.
"""

import os
import shutil
import sys
from functools import partial

import kmeans
import torch
import torch.distributed as dist
from common import DEVICE, QUICK, describe, save, take_turns
from torch.nn import functional as F

from mcn_ext import distributed, ops


def milliseconds(n, call, *arguments, **options):
    return take_turns({"": lambda: call(*arguments, **options)}, 1, n)[""]["ms"]


def normal(*size, dtype=torch.bfloat16):
    return torch.randn(*size, device=DEVICE).to(dtype)


def machine(note):
    """Its memory, a copy's bandwidth, the losses' matrix products, and one large product."""
    gib = 2.0**30
    note("/dev/shm free, GiB", shutil.disk_usage("/dev/shm").free / gib)
    if DEVICE == "cuda":
        p = torch.cuda.get_device_properties(0)
        note("gpu memory", {"GiB": p.total_memory / gib, "SMs": p.multi_processor_count})
    x = torch.empty(2**20 if QUICK else 2**30, dtype=torch.int32, device=DEVICE).random_()
    y = torch.empty_like(x)
    note("copy, TB/s", 2 * x.nbytes / milliseconds(5, y.copy_, x) / 1e9)
    del x, y
    sizes = ((4096, 512), (4096, 1024), (4096, 6144), (8192, 8192))
    for n, d in ((256, 64),) if QUICK else sizes:
        a, b, p = normal(n, d), normal(n, d), normal(n, n)
        calls = {
            "S = x y^T, bf16": partial(torch.mm, a, b.t()),
            "P y, bf16": partial(torch.mm, p, b),
        }
        if DEVICE == "cuda":  # CPUs lack these
            s, g = (torch.zeros(n, width, device=DEVICE) for width in (n, d))
            wide = {"out_dtype": torch.float32}
            calls["S, fp32 out"] = partial(torch.mm, a, b.t(), **wide, out=s)
            calls["P y, fp32 out"] = partial(torch.mm, p, b, **wide, out=g)
            calls["P^T x, fp32 out"] = partial(torch.mm, p.t(), a, **wide, out=g)
            add = torch.ops.aten.addmm.dtype_out
            calls["P y, added to fp32"] = partial(add, g, p, b, **wide, out=g)
        rates = {name: 2 * n * n * d / milliseconds(10, call) / 1e9 for name, call in calls.items()}
        note(f"N {n}, D {d}, TFLOP/s", rates)


def nccl(note):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29577", RANK="0", WORLD_SIZE="1")
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo", rank=0, world_size=1)
    x, y = (normal(200, 33, dtype=torch.float32).requires_grad_() for _ in range(2))
    alone = ops.contrastive_loss(x, y)
    wanted = [alone, *torch.autograd.grad(alone, (x, y))]
    of = distributed.Ranks.of
    distributed.Ranks.of = classmethod(lambda cls, group: cls(group))  # a group of one counts, too
    try:
        for budget in (None, 0):
            loss = ops.contrastive_loss(x, y, group=dist.group.WORLD, budget=budget)
            found = [loss, *torch.autograd.grad(loss, (x, y))]
            errors = [(a - b).abs().max().item() for a, b in zip(found, wanted, strict=True)]
            what = f"collectives over {dist.get_backend()}, budget {budget}: differences"
            note(what, dict(zip(("loss", "gradient of x", "of y"), errors, strict=True)))
    finally:
        distributed.Ranks.of = of
        dist.destroy_process_group()


def k_means(note):
    for row in kmeans.measure():
        note(f"k-means, {row.pop('fit')}, {row.pop('k-means')}", row)


def convolutions(note):
    clips = 2 if QUICK else 1024
    layers = [(128, 128, 1000, 2), (128, 128, 500, 1), (128, 256, 500, 2), (256, 256, 250, 1)]
    layers += [(256, 512, 250, 2), (512, 512, 125, 1), (512, 1024, 125, 2), (1024, 1024, 63, 1)]
    for a, b, frames, stride in layers:
        if QUICK:
            a, b, frames = a // 16, b // 16, frames // 10
        gflop = 2 * clips * -(-frames // stride) * a * b * 9 / 1e9
        for layout, tall, memory, benchmark in (
            ("(B, C, 1, T) channels_last", False, torch.channels_last, False),
            ("(B, C, 1, T) channels_last, benchmark", False, torch.channels_last, True),
            ("(B, C, T, 1) channels_last", True, torch.channels_last, False),
            ("(B, C, 1, T) contiguous", False, torch.contiguous_format, False),
        ):
            torch.backends.cudnn.benchmark = benchmark
            turn = slice(None, None, -1 if tall else 1)
            x = normal(clips, a, *(1, frames)[turn]).contiguous(memory_format=memory)
            w = normal(b, a, *(1, 9)[turn]).contiguous(memory_format=memory)
            forward = partial(F.conv2d, x, w, None, [1, stride][turn], [0, 4][turn])
            x.requires_grad_(), w.requires_grad_()
            y = forward()
            # Of one input alone autograd computes the gradient of it alone.
            backward = partial(torch.autograd.grad, y, grad_outputs=torch.randn_like(y))
            rates = {"forward": gflop / milliseconds(3, forward)}
            for name, of in {"input": x, "weight": w}.items():
                ms = milliseconds(3, backward, inputs=of, retain_graph=True)
                rates[f"gradient of the {name}"] = gflop / ms
            note(f"{a} -> {b}, {frames} frames, stride {stride}, {layout}, TFLOP/s", rates)
    torch.backends.cudnn.benchmark = False


EXPERIMENTS = {f.__name__: f for f in (machine, nccl, k_means, convolutions)}


def main():
    failed, file = False, "machine" if sys.argv[1:] == ["machine"] else "experiments"
    found = describe()

    def note(name, value):
        found[name] = value
        print(f"{name}: {value}", flush=True)
        save(file, found)  # the next may be stopped

    for name in sys.argv[1:]:
        try:
            EXPERIMENTS[name](note)
        except Exception as error:  # an experiment that fails is a result; the others run
            note(name, f"{type(error).__name__}: {str(error)[:300]}")
            failed = True
    sys.exit(failed)


if __name__ == "__main__":
    main()
