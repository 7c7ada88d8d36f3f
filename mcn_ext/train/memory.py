"""Estimates, before the first step, whether the machine's memory suffices for a run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mcn_ext import distributed
from mcn_ext.data.batch import to_device
from mcn_ext.data.clips import PREFETCH
from mcn_ext.data.shares import ANYWAY
from mcn_ext.model import MCN

TRIED = 4  # clips of the forward pass by which a step's memory is estimated
# Peak memory of a step on a CPU, in units of what its forward pass keeps for backward: 3.9
# with 256 clips a step and 2.8 with 1024, by resident memory. It falls with the number of clips,
# and large numbers are what matters. The rest are buffers of convolutions and gradients.
PEAK = 3


def _ranks_here() -> int:
    """Ranks on this machine, which share its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def check_shared_memory(sample: Mapping[str, Tensor], n_clips: int, workers: int) -> None:
    """SystemExit if the batches read ahead on this machine do not fit into /dev/shm: a worker that
    finds no memory there loses its batch, and the run waits for it. All ranks call this.

    sample: some clips as :func:`.collate` returns them. n_clips: of a batch on a rank.
    """
    if not workers or not os.path.isdir("/dev/shm"):
        return
    clip_bytes = sum(x.nbytes for x in sample.values()) / len(sample["clip_id"])
    one_each = int(_ranks_here() * (PREFETCH + 1) * n_clips * clip_bytes)
    needed, free = workers * one_each, shutil.disk_usage("/dev/shm").free
    # One rank's answer stops all: else the others would wait for it in the first step.
    if any(distributed.gather_objects(needed > free)) and not os.environ.get(ANYWAY):
        distributed.fail(
            f"--workers {workers} on {_ranks_here()} rank(s) keep up to {needed / 1e9:.2f} GB of "
            f"batches in shared memory, and /dev/shm has {free / 1e9:.2f} GB free. Use --workers "
            f"{free // one_each}, or, in a container, docker run --shm-size "
            f"{needed // 2**30 + 1}g. ({ANYWAY}=1 in the environment goes on.)"
        )


def check(model: MCN, sample: Mapping[str, Tensor], n_clips: int, table: Tensor | None) -> None:
    """SystemExit if steps of ``n_clips`` clips a rank need more than the CPU's free memory: a GPU
    ends with an error then, but a CPU swaps, and the machine stands still. All ranks call this."""
    needed, free = _ranks_here() * step_bytes(model, sample, n_clips, table), free_bytes()
    if not any(distributed.gather_objects(needed > free)) or os.environ.get(ANYWAY):
        return
    distributed.fail(
        f"a training step needs about {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are "
        "free. Lower --batch_size, --n_pair or --audio_frames, add --checkpoint_activations, or use"
        f" --preset demo, whose sizes are for a CPU. ({ANYWAY}=1 in the environment goes on.)"
    )


def step_bytes(model: MCN, sample: Mapping[str, Tensor], n_clips: int, table: Tensor | None) -> int:
    """Bytes that a training step of ``n_clips`` clips takes beyond the weights, estimated by what a
    forward pass of a few keeps for backward. table: word vectors, as in :func:`.to_device`."""
    # On the CPU: check() is for runs without a GPU.
    batch = to_device({key: x[:TRIED] for key, x in sample.items()}, torch.device("cpu"), table)
    # Backward keeps weights too, but they are there already.
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}  # by storage: several tensors may share one

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    model.eval()  # so that BatchNorm's statistics stay as they are
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        model(batch)
    model.train()
    learnt = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return 3 * learnt + PEAK * sum(kept.values()) * n_clips // TRIED  # 3: gradients, two moments


def free_bytes() -> int:
    """Memory that is left on this machine, or in the container that this process runs in."""
    try:
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        free = next(int(line[1]) * 1024 for line in lines if line[0] == "MemAvailable:")
    except OSError:  # not Linux: no estimate
        return 2**63
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())  # "max" is no number: no limit
        used = int((group / "memory.current").read_text())
        facts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return min(free, limit - used + int(facts["inactive_file"]))  # a cache of files gives way
    except (OSError, ValueError, KeyError):
        return free
