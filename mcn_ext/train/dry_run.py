"""``--dry_run``: a run's first steps, of which nothing is kept, and what the whole of it will cost.

The steps are the run's own: its data, batch, sizes, ranks and precision, on its machine. A refit of
k-means is timed on some rows of the width and scaled by their number; the rest is arithmetic.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path
from statistics import median

import torch

from mcn_ext import distributed
from mcn_ext.clustering import spherical_kmeans
from mcn_ext.train.log import read

STEPS = 6
ROWS = 8192  # a rank, of the refit that is timed


def begin(args: argparse.Namespace, folder: Path) -> Path:
    """Make ``args`` those of a dry run: few steps, nothing resumed; the folder, which is deleted at
    the end."""
    args.max_steps, args.log_every, args.resume = STEPS, 1, False
    folder = folder.with_name(f"{folder.name}-dry_run")
    if distributed.rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    distributed.barrier()
    return folder


def _seconds_of_refit(clusters, width: int, device: torch.device, rows: int) -> float:
    """Of k-means on ``rows`` rows from a warm start, by a fit of ROWS a rank at most, which all
    ranks share."""
    n = max(min(rows, ROWS * min(distributed.world(), 8)), clusters.k)
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(n, width, generator=generator, device=device)

    def seconds() -> float:
        begun = time.perf_counter()
        spherical_kmeans(x, clusters.k, init=x[: clusters.k], max_iter=20)[0].cpu()
        return time.perf_counter() - begun

    return min(seconds() for _ in range(2)) * rows / n


def plan(run, refit: float, queue: int) -> list[str]:
    """Lines for people, of a :class:`.Training` that has done its steps; a refit's
    seconds and rows."""
    args, objective, model = run.args, run.objective, run.model
    rows = [row for row in read(run.folder / "log.jsonl") if "clips_per_s" in row]
    n_clips = args.batch_size * args.n_pair
    later = rows[1:] or rows  # the first step starts workers, and compiles or picks kernels
    step = median(n_clips / row["clips_per_s"] for row in later)
    waiting = median(row["data_wait"] for row in later)
    steps = run.loader.steps_per_epoch
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in model.parameters())
    clusters = objective.clusters
    refits = steps / clusters.refit_every if clusters else 0.0
    epoch = steps * step + refits * refit
    width = model.sizes["embd_dim"]
    latest = 4 * everything + 8 * trained + 4 * queue * width
    kept = 4 * everything * args.epochs if args.keep_epochs else 0
    memory = max(row["peak_mib"] for row in rows) / 1024
    later_memory = max(0, queue - len(rows) * n_clips) * width * 4 / 2**30
    lines = [
        f"DRY RUN, {STEPS} steps on {distributed.world()} rank(s), {run.device}; nothing was kept",
        f"  data        {len(run.loader.loader.dataset)} videos with captions, {steps} steps an "
        f"epoch, {args.epochs} epochs, {steps * args.epochs} steps",
        f"  a step      {step:.3g} s ({n_clips / step:.0f} clips a second), of which waiting for "
        f"data {100 * waiting:.0f} %",
    ]
    if clusters:
        lines.append(
            f"  k-means     about {refit:.2g} s a refit of {queue} rows, "
            f"{refits:.1f} an epoch: {100 * refits * refit / epoch:.0f} % of the time"
        )
    return [
        *lines,
        f"  time        {_time(epoch)} an epoch, {_time(epoch * args.epochs)} in all",
        f"  memory      {memory:.1f} GiB a rank at its peak"
        + (
            f", and {later_memory:.1f} GiB when the clustering queue is full"
            if later_memory > 0.05
            else ""
        ),
        f"  disk        {latest / 2**30:.2f} GiB for checkpoint.pt, the same while it is "
        "replaced and for the one before"
        + (
            f", {kept / 2**30:.2f} GiB for the epochs' weights (--no-keep_epochs: none)"
            if kept
            else ""
        ),
        f"  advice      {_advice(waiting, args)}",
    ]


def _advice(waiting: float, args: argparse.Namespace) -> str:
    if waiting > 0.1:
        return (
            "the step waits for its data: more --workers, a local disk, or nothing to do if "
            "this was the first time that the store was read"
        )
    less = f", less than {args.micro_batch}" if args.micro_batch else ""
    return f"the data keep up; out of memory on a GPU? --micro_batch{less}"


def _time(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def finish(run) -> None:
    """Say the plan, and delete the folder."""
    refit, queue = 0.0, 0
    if clusters := run.objective.clusters:  # all ranks: they share it
        queue = clusters.queue_size * run.args.batch_size * run.args.n_pair
        refit = _seconds_of_refit(clusters, run.model.sizes["embd_dim"], run.device, queue)
    if distributed.rank() == 0:
        print("\n".join(plan(run, refit, queue)), file=sys.stdout, flush=True)
        shutil.rmtree(run.folder, ignore_errors=True)
    distributed.barrier()
