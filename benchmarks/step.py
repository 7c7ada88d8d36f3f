"""One training step taken apart, ours beside a plain one (benchmarks/step_plain.py).

    python benchmarks/step.py --preset demo
    python benchmarks/step.py --preset paper --batch_size 1 --n_pair 8 --cluster_size 64
    python benchmarks/step.py --preset paper --data paper.h5            # a GPU: 4096 clips

Flags are train_stage1.py's, of --pair AVT. Without --data clips of full length are made up. Loading
is measured by loader.py, k-means by kmeans.py. Encoders run in --precision (a GPU: bf16, else
fp32), the plain step in fp16 on a GPU.

Parts: milliseconds, waiting for the device after each. "In a row": steps that do not wait for each
other, on one batch; host_ms is the part until all is launched. Ours and the plain step take turns.
On a GPU follow ours with --checkpoint_activations, and the plain step in bf16, then channels_last,
then compiled as well; peak_gib is the device's memory, less what weights and Adam took before.
GFLOP: counted from the shapes of ours (a multiply and an add are 2).
"""

import math
import sys
import tempfile
from collections import defaultdict
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from common import DEVICE, QUICK, describe, now, save, show, take_turns
from made_up import make_store, published, random_words
from step_plain import NAMES, Plain, Step
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import train_stage1
from mcn_ext.data.clips import ClipReader, TrainingClips, collate
from mcn_ext.data.store import Store
from mcn_ext.model import MCN
from mcn_ext.objective import Objective
from mcn_ext.train.guard import Guard


def clock_into(taken: dict):
    """A context manager that adds the milliseconds of a part of a step to ``taken[part]``."""

    @contextmanager
    def clock(part: str):
        begin = now()
        yield
        taken[part].append(now() - begin)

    return clock


@contextmanager
def no_clock(part: str):
    yield


class Ours(Step):
    """train_stage1.py's step; centroids are random, and stay."""

    def __init__(self, args, dims, table, autocast, checkpointed=False):
        torch.manual_seed(0)
        self.table, self.autocast = table, autocast
        self.model = MCN(
            "AVT",
            video_dims=dims,
            embd_dim=args.embd_dim,
            recon_dim=args.recon_dim,
            audio_width=args.audio_width,
            checkpoint_activations=checkpointed,
        ).to(DEVICE)
        self.objective = Objective(
            list(NAMES),
            list(NAMES),
            cluster_size=args.cluster_size,
            queue_size=args.queue_size,
            temperature=args.temperature,
            cluster_weight=args.cluster_weight,
            recon_weight=args.recon_weight,
        )
        clusters = self.objective.clusters
        clusters.refit_every = 10**9
        clusters.centroids = F.normalize(
            torch.randn(args.cluster_size, args.embd_dim, device=DEVICE)
        )
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-4, fused=True)
        scaler = torch.amp.GradScaler(DEVICE, enabled=False)
        self.guard = Guard(self.model, self.objective, scaler, Path())
        self.model.train()

    def embed(self, name, batch):
        return self.model.embed(name, batch)

    def loss(self, rows, errors, batch):
        self.terms = self.objective(rows, errors, batch)
        return self.terms.total

    def finish(self, total):
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters()])
        self.guard.check(total, norm)
        self.optimizer.step()
        self.guard.remember()
        self.objective.update_clusters(self.terms)


def channels_last(*arguments, compiled=False):
    plain = Plain(*arguments)
    plain.davenet.to(memory_format=torch.channels_last)
    if compiled:
        plain.davenet.compile()
    return plain


def read(args, folder: Path) -> tuple[dict, dict, torch.Tensor]:
    """A batch as the loader hands it over, the video streams' widths, the words' vectors."""
    if args.data:
        store = Store(args.data)
    else:
        seconds = args.audio_frames / 100
        store = make_store(
            folder / "train.h5", args.batch_size, args.n_pair, published(2048), seconds
        )
    dims = store.streams("V")
    words = random_words(store)
    reader = ClipReader(store, "AVT", words=words, audio_frames=args.audio_frames)
    clips = TrainingClips(reader, n_pair=args.n_pair, min_time=args.min_time, seed=0)
    order = np.resize(np.arange(len(clips)), args.batch_size)
    batch = collate([clips[0, int(i)] for i in order])
    if DEVICE == "cuda":  # as the loader's thread does beside the step
        batch = {key: value.pin_memory() for key, value in batch.items()}
    return batch, dims, torch.from_numpy(words.vectors).to(DEVICE)


def arguments(words: list[str]):
    parser = train_stage1.get_parser()
    words = ["--pair", "AVT", *words]
    parser.set_defaults(**train_stage1.PRESETS[parser.parse_args(words).preset or "paper"])
    return parser.parse_args(words)


def autocast(precision: str):
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return partial(torch.autocast, DEVICE, dtypes.get(precision), enabled=precision in dtypes)


def in_a_row(steps: dict, batch) -> list[dict]:
    """A row for each step; on a GPU with the memory that it takes beside weights and Adam."""
    calls = {name: partial(step.step, no_clock, batch) for name, step in steps.items()}
    found = take_turns(calls, *(2, 5) if DEVICE == "cuda" else (3, 1))
    rows = []
    for name, call in calls.items():
        row = {"step": name, "clips/s": 1e3 * len(batch["n_frames"]) / found[name]["ms"]}
        rows.append(row | found[name])
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            rows[-1]["peak_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    return rows


def parts_of(steps: dict, batch) -> list[dict]:
    """Median milliseconds of each part, by step."""
    taken = {name: defaultdict(list) for name in steps}
    clocks = {name: clock_into(of) for name, of in taken.items()}
    calls = {name: partial(step.step, clocks[name], batch) for name, step in steps.items()}
    take_turns(calls, 3)
    return [
        {"part": part} | {f"{name}, ms": median(taken[name][part]) for name in steps}
        for part in taken["ours"]
    ]


def count_gflop(ours: Ours, args, batch) -> float:
    n = len(batch["n_frames"])
    with FlopCounterMode(display=False) as counter:
        ours.step(no_clock, batch)
    # What is compiled is not counted: three pairs and three cluster terms, forward and backward.
    losses = 6 * n * (3 * n + 2 * args.cluster_size) * args.embd_dim
    return (counter.get_total_flops() + losses) / 1e9


def main():
    args = arguments(sys.argv[1:])
    gpu = DEVICE == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        batch, *inputs = read(args, Path(folder))
    half = autocast("bf16")
    own, usual = autocast(args.precision or "bf16" * gpu), autocast("fp16" * gpu)
    groups = [{"ours": (Ours, own), "plain": (Plain, usual)}]
    if gpu or QUICK:
        groups += [
            {"ours, checkpointed": (partial(Ours, checkpointed=True), own)},
            {"plain bf16": (Plain, half)},
            {"plain bf16, channels_last": (channels_last, half)},
        ]
    if gpu:  # on two cores it takes minutes
        groups.append(
            {"plain bf16, channels_last, compiled": (partial(channels_last, compiled=True), half)}
        )
    rows = []
    report = describe() | {"flags": {key: str(value) for key, value in vars(args).items()}}
    for group in groups:
        try:
            steps = {name: make(args, *inputs, cast) for name, (make, cast) in group.items()}
            if not rows:
                report["gflop"] = count_gflop(steps["ours"], args, batch)
                report["parts"] = parts_of(steps, batch)
            rows += in_a_row(steps, batch)
        except Exception as error:
            if "ours" in group:
                raise
            # A compiler's error, or out of memory: a result.
            rows += [{"step": name, "error": " ".join(str(error).split())[:200]} for name in group]
        steps = None  # its weights and Adam's moments
        save(f"step-{args.preset or 'paper'}", report | {"in a row": rows})
    for row in rows:
        row["ours / it"] = rows[0]["ms"] / row.get("ms", math.nan)
    show(f"{len(batch['n_frames'])} clips, {report['gflop']:.1f} GFLOP a step", report["parts"])
    show("In a row", rows)


if __name__ == "__main__":
    main()
