"""One training step taken apart, ours beside a plain one (benchmarks/step_plain.py).

    python benchmarks/step.py --preset demo
    python benchmarks/step.py --preset digits --data digits/train.h5
    python benchmarks/step.py --preset paper --batch_size 1 --n_pair 8 --cluster_size 64
    python benchmarks/step.py --preset paper                            # a GPU: 4096 clips
    python benchmarks/step.py --preset paper --batch_size 512 --checkpoint_activations --memory ours

Sizes are the preset's, each changed by its flag; --json adds the result to a file. Without --data,
demo is the demo data, others made-up clips of full length. Loading is the same, not compared.
Encoders run in --precision, the plain step in --plain_precision (a GPU: bf16 and fp16; else fp32).
--strong: beside them, in a row, the plain step in bf16, then channels_last, then compiled as well.

Time: median of the repeats, in each of which the implementations take turns; wall, and processor
time, which the machine's other work changes less (of a GPU: the host's, until all is launched).
Parts wait for the device; "in a row" are steps that do not, on one batch, by the clock outside.
k-means: a refit divided by --queue_size, the steps between two. GFLOP: counted as executed, from
shapes (a multiply and an add are 2). The ceiling is a matrix product of 1536 cubed in fp32, on a
GPU of 8192 cubed in --precision, in the same repeats and threads; fractions of it are by processor
time, on a GPU wall.
Memory: what a step takes above weights, optimiser and batch, in a process of its own after a
warm-up step: growth of VmHWM over VmRSS (Linux); on a GPU, with the batch, of allocated memory.
--no-peaks leaves them out: each reads the clips again.
"""

import argparse
import ctypes
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a checkout that was built in place, not installed

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import train_stage1  # noqa: E402
from benchmarks.step_plain import NAMES, Plain  # noqa: E402
from mcn_ext.clustering import spherical_kmeans  # noqa: E402
from mcn_ext.data.clips import ClipReader, TrainingClips, collate, to_device  # noqa: E402
from mcn_ext.data.store import Store, StoreWriter  # noqa: E402
from mcn_ext.data.words import WordVectors  # noqa: E402
from mcn_ext.model import MCN  # noqa: E402
from mcn_ext.objective import Objective  # noqa: E402
from mcn_ext.train.guard import Guard  # noqa: E402

DIGITS = dict(
    batch_size=16,
    n_pair=6,
    lr=2e-3,
    embd_dim=256,
    recon_dim=1024,
    audio_width=0.25,
    audio_frames=400,
    min_time=0.5,
    cluster_size=64,
    temperature=0.1,
    recon_weight=5.0,
    cluster_weight=0.3,
)
PRESETS = {"paper": {}, "demo": train_stage1.DEMO, "digits": DIGITS}  # digits: the README's command
SIZES = {
    **dict.fromkeys(
        ("batch_size", "n_pair", "audio_frames", "embd_dim", "recon_dim", "cluster_size"), int
    ),
    "audio_width": float,
}


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """Milliseconds of a step's parts, wall and processor, and what FlopCounterMode counts in them;
    nothing, without ``device``."""

    def __init__(self, device: torch.device | None = None):
        self.device = device
        self.wall, self.cpu = defaultdict(list), defaultdict(list)
        self.flops, self.counting = {}, False

    @contextmanager
    def __call__(self, part: str):
        if self.device is None:
            yield
            return
        wait(self.device)
        cpu, wall = time.process_time(), time.perf_counter()
        with FlopCounterMode(display=False) if self.counting else nullcontext() as counter:
            yield
        self.cpu[part].append(1e3 * (time.process_time() - cpu))
        wait(self.device)
        self.wall[part].append(1e3 * (time.perf_counter() - wall))
        if self.counting:
            self.flops[part] = counter.get_total_flops()


# ------------------------------------------------------------------------------------------ data
def make_store(path: Path, args, n_captions: int) -> Path:
    """Videos, 64 at most, of clips that all are as long as the audio that is used of them."""
    seconds, rng = args.audio_frames / 100, np.random.default_rng(0)
    specs = {
        name: {"dim": dim, "rate_hz": rate}
        for (name, dim), rate in zip(args.dims.items(), (1.0, 1.5), strict=False)
    } | {"mel": {"dim": 40, "rate_hz": 100.0}}
    writer = StoreWriter(path, specs, "benchmark data")
    start = np.arange(n_captions) * seconds
    for video in range(min(64, args.batch_size)):
        rows = {
            name: rng.uniform(
                -80 * (name == "mel"),
                name != "mel",
                (math.ceil(n_captions * seconds * spec["rate_hz"]) + 1, spec["dim"]),
            )
            for name, spec in specs.items()
        }
        words = [" ".join(f"w{i}" for i in rng.integers(0, 999, 20)) for _ in start]
        writer.add(f"v{video}", rows, start, start + seconds, words)
    return writer.close()


class Clips:
    """Batches of a store, read as a training run reads them."""

    def __init__(self, args, folder: Path):
        if args.data is None and args.preset == "demo":
            from mcn_ext.prepare import demo

            demo.prepare(folder)
            args.data = folder / "train.h5"
        args.data = args.data or make_store(folder / "train.h5", args, 2 * args.n_pair)
        store = Store(args.data)
        args.dims = {name: dim for name, dim in store.dims.items() if name != "mel"}
        texts = sorted(
            {
                word
                for video in range(len(store))
                for text in store.caption_texts(video)
                for word in text.split()
            }
        )
        vectors = np.random.default_rng(0).normal(size=(len(texts), 300)).astype(np.float32)
        self.words, self.store = WordVectors(texts, vectors, "random"), store
        reader = ClipReader(
            store,
            "AV",
            video_streams=tuple(args.dims),
            words=self.words,
            audio_frames=args.audio_frames,
            max_words=20,
        )
        self.clips = TrainingClips(reader, n_pair=args.n_pair, min_time=args.min_time, seed=0)
        self.table, self.n, self.read_ = torch.from_numpy(vectors), args.batch_size, 0

    def read(self) -> dict:
        self.read_ += 1
        order = np.random.default_rng(self.read_).permutation(len(self.clips))
        order = np.resize(order, self.n)  # again from its start, where there are fewer videos
        return collate([self.clips[self.read_, int(i)] for i in order])


# ----------------------------------------------------------------------------------- both steps
class Ours:
    """train_stage1.py's step, part by part."""

    def __init__(self, args, table, device, autocast, folder: Path):
        torch.manual_seed(0)
        self.table, self.device, self.autocast = table, device, autocast
        self.model = MCN(
            "AVT",
            video_dims=args.dims,
            embd_dim=args.embd_dim,
            recon_dim=args.recon_dim,
            audio_width=args.audio_width,
            checkpoint_activations=args.checkpoint_activations,
        ).to(device)
        self.objective = Objective(
            list(NAMES),
            list(NAMES),
            cluster_size=args.cluster_size,
            queue_size=args.queue_size,
            temperature=args.temperature,
            cluster_weight=args.cluster_weight,
            recon_weight=args.recon_weight,
        )
        self.objective.clusters.refit_every = 10**9  # refits are timed apart
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-4, fused=True)
        self.guard = Guard(
            self.model,
            self.objective,
            torch.amp.GradScaler(device.type, enabled=False),
            folder,
        )
        self.model.train()

    def step(self, clock, batch):
        with clock("transfer"):
            batch = to_device(batch, self.device, self.table)
        self.guard.remember()
        found = {}
        for name in NAMES:
            with clock(f"{name} forward"), self.autocast():
                found[name] = self.model.embed(name, batch)
        embeddings, errors = (
            {name: ends[side].detach().requires_grad_() for name, ends in found.items()}
            for side in (0, 1)
        )
        with clock("losses"):
            terms = self.objective(embeddings, errors, batch)
            terms.total.backward()
        for name, ends in found.items():
            with clock(f"{name} backward"):
                torch.autograd.backward(ends, [embeddings[name].grad, errors[name].grad])
        with clock("optimiser"):
            grads = [p.grad for p in self.model.parameters()]
            self.guard.check(terms.total, torch.nn.utils.get_total_norm(grads))
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.objective.update_clusters(terms)

    def refit(self, queue, k):
        clusters = self.objective.clusters
        clusters.centroids, _ = spherical_kmeans(queue, k, init=clusters.centroids)


# ----------------------------------------------------------------------------------- measurement
def queue_of(args, seed: int) -> torch.Tensor:
    """As many rows as the queue holds, around more directions than there are centroids."""
    device = args.device
    g, same = (torch.Generator(device).manual_seed(s) for s in (seed, 0))
    n, d, k = args.queue_size * args.batch_size * args.n_pair, args.embd_dim, 2 * args.cluster_size
    centres = F.normalize(torch.randn(k, d, generator=same, device=device))
    rows = torch.randn(n, d, generator=g, device=device).div_(d**0.5)
    return F.normalize(rows.add_(centres[torch.randint(k, (n,), generator=g, device=device)]))


def both(args, clips: Clips, folder: Path) -> dict:
    """The two steps, by name, as functions that make them."""
    table, device = clips.table.to(args.device), args.device
    types = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    casts = [
        partial(torch.autocast, device.type, dtype=types[name], enabled=name != "fp32")
        for name in (args.plain_precision, args.precision)
    ]
    return {
        "plain": lambda: Plain(args, table, device, casts[0]),
        "ours": lambda: Ours(args, table, device, casts[1], folder),
    }


def in_a_row(step, batch: dict, device: torch.device, n: int = 5) -> float:
    """Milliseconds of a step among ``n`` that do not wait for each other."""
    wait(device)
    begin = time.perf_counter()
    for _ in range(n):
        step.step(Clock(), batch)
    wait(device)
    return 1e3 * (time.perf_counter() - begin) / n


def measure(args, folder: Path) -> dict:
    clips, fill, device = Clips(args, folder), [], args.device
    steps = {name: make() for name, make in both(args, clips, folder).items()}
    clocks = {name: Clock(device) for name in (*steps, "matmul")}
    side, half = 1536, None
    if device.type == "cuda":
        side, half = 8192, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.precision)
    a = torch.randn(side, side, device=device, dtype=half)
    for name, step in steps.items():  # warm-up, and the count
        step.refit(queue_of(args, 0), args.cluster_size)
        clocks[name].counting = True  # only here: it takes time
        step.step(clocks[name], clips.read())
    n = args.batch_size * args.n_pair  # what is compiled is not counted: 3 pairs, 3 cluster terms
    clocks["ours"].flops["losses"] = 6 * n * (3 * n + 2 * args.cluster_size) * args.embd_dim
    for clock in clocks.values():
        clock.counting = clock.wall.clear() or clock.cpu.clear()
    row = {name: [] for name in steps}
    for repeat in range(args.repeats):
        for name, step in steps.items():
            clips.read_ = repeat  # the same clips for both
            with clocks[name]("load"):
                batch = clips.read()
            if device.type == "cuda":  # as the loader's thread does beside the step
                batch = {key: value.pin_memory() for key, value in batch.items()}
            step.step(clocks[name], batch)
            queue = queue_of(args, repeat + 1)
            with clocks[name]("k-means"):
                step.refit(queue, args.cluster_size)
            del queue
            for taken in (clocks[name].wall, clocks[name].cpu):
                taken["k-means"][-1] /= args.queue_size
            if device.type == "cuda" or args.strong:
                row[name].append(in_a_row(step, batch, device))
        fill.append(float(batch["n_frames"].sum()) / len(batch["n_frames"]) / args.audio_frames)
        with clocks["matmul"]("matmul"):
            for _ in range(4):
                a @ a
    matmul = 4 * 2 * side**3 / 1e6
    ceiling = {
        kind: matmul / median(getattr(clocks["matmul"], kind)["matmul"]) for kind in ("wall", "cpu")
    }
    rows = {
        name: {
            part: {
                "ms": median(clock.wall[part]),
                "cpu_ms": median(clock.cpu[part]),
                "gflop": clock.flops.get(part, 0) / 1e9,
            }
            for part in clock.wall
        }
        for name, clock in clocks.items()
        if name in steps
    }
    found = {name: median(ms) for name, ms in row.items() if ms}
    if args.strong:
        del steps, step  # their weights and optimisers' states
        found |= strong(args, clips, batch)
    return {"rows": rows, "ceiling_gflops": ceiling, "fill": median(fill), "in_a_row_ms": found}


def strong(args, clips: Clips, batch: dict) -> dict:
    """Milliseconds in a row of plain steps that use more of what PyTorch offers, or an error. On a
    CPU nothing is compiled: that takes minutes."""
    device, found = args.device, {}
    bf16 = partial(torch.autocast, device.type, dtype=torch.bfloat16)
    for name in ("plain bf16", "plain bf16 channels_last", "plain bf16 channels_last compiled")[
        : 3 if device.type == "cuda" else 2
    ]:
        plain = Plain(args, clips.table.to(device), device, bf16)
        if "channels_last" in name:
            plain.davenet.to(memory_format=torch.channels_last)
        if "compiled" in name:
            plain.davenet.compile()
        try:
            in_a_row(plain, batch, device, 2)
            found[name] = in_a_row(plain, batch, device)
        except Exception as error:  # a compiler's, or out of memory: a result
            print(f"{name} is left out: {type(error).__name__}: {str(error)[:200]}", flush=True)
        del plain
    return found


def peak(args, folder: Path) -> float:
    """MiB that a step takes above what is there before: weights, optimiser, batch."""

    def status(field):
        return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0])

    clips, device = Clips(args, folder), args.device
    step = both(args, clips, folder)[args.memory]()
    for _ in range(2):
        batch = clips.read()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            step.step(Clock(), batch)
            taken = (torch.cuda.max_memory_allocated(device) - before) / 2**20
            continue
        ctypes.CDLL(None).malloc_trim(0)
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        step.step(Clock(), batch)
        taken = (status("VmHWM") - before) / 1024
    return taken


def peaks_of(args) -> dict[str, float | None]:
    """:func:`peak` of each way, in a process of its own; None, and why, if that fails."""
    found, flag = {}, "--checkpoint_activations"
    for way, words in {
        "plain": ["plain"],
        "ours": ["ours", flag.replace("--", "--no-")],
        f"ours, {flag}": ["ours", flag],
    }.items():
        command = [sys.executable, __file__, *sys.argv[1:], "--data", args.data, "--memory", *words]
        done = subprocess.run([str(x) for x in command], capture_output=True, text=True)
        found[way] = None if done.returncode else float(done.stdout)
        if done.returncode:
            print(f"--memory {' '.join(words)}: {done.stderr.strip()[-300:]}")
    return found


def table(result: dict) -> list[str]:
    plain, ours = result["rows"]["plain"], result["rows"]["ours"]
    by = "ms" if result["in_a_row_ms"] else "cpu_ms"  # a GPU's, or the processor's
    top = result["ceiling_gflops"]["wall" if by == "ms" else "cpu"]
    lines = [
        "| part | plain, ms | ours, ms | ratio | by processor time | ours, GFLOP | GFLOP/s | "
        "of the ceiling |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    kinds = ("ms", "cpu_ms", "gflop")
    whole = [
        {kind: sum(row[kind] for part, row in rows.items() if part != "load") for kind in kinds}
        for rows in (plain, ours)
    ]
    named = [(part, plain[part], ours[part]) for part in ours]
    for part, p, o in [*named, ("**step** without load", *whole)]:
        rate = o["gflop"] / max(o[by], 1e-9) * 1e3
        work = f"{o['gflop']:.2f} | {rate:.0f} | {rate / top:.2f}" if o["gflop"] > 0.01 else "| | "
        lines.append(
            f"| {part} | {p['ms']:.1f} | {o['ms']:.1f} | {o['ms'] / p['ms']:.2f} | "
            f"{o['cpu_ms'] / max(p['cpu_ms'], 1e-9):.2f} | {work} |"
        )
    result["ratio"] = {kind: whole[1][kind] / whole[0][kind] for kind in kinds}
    return lines


def arguments(words=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="demo")
    parser.add_argument("--data", type=Path)
    parser.add_argument(
        "--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    for name in ("precision", "plain_precision"):
        parser.add_argument(f"--{name}", choices=("fp32", "bf16", "fp16"))
    for name, kind in SIZES.items():
        parser.add_argument(f"--{name}", type=kind)
    parser.add_argument("--video_dims", type=int, nargs=2, default=(2048, 2048))
    parser.add_argument("--checkpoint_activations", action=argparse.BooleanOptionalAction)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--memory", choices=("plain", "ours"), help="print a step's peak, MiB")
    parser.add_argument("--peaks", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--strong", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(words)
    args = train_stage1.get_parser().parse_args(["--pair", "AVT"])
    vars(args).update(PRESETS[given.preset])
    for name, value in vars(given).items():
        if value is not None or not hasattr(args, name):
            setattr(args, name, value)
    on_gpu = args.device.type == "cuda"
    args.precision = args.precision or ("bf16" if on_gpu else "fp32")
    args.plain_precision = args.plain_precision or ("fp16" if on_gpu else "fp32")
    args.dims = dict(zip(("2d", "3d"), args.video_dims, strict=True))
    return args


def main():
    args = arguments()
    on_gpu = args.device.type == "cuda"
    with tempfile.TemporaryDirectory() as tmp:
        if args.memory:
            return print(f"{peak(args, Path(tmp)):.0f}")
        Clips(args, Path(tmp))  # makes the store that all processes read, if none is given
        peaks = peaks_of(args) if args.peaks else {}  # first: the card is empty
        load = [os.getloadavg()[0]]
        result = measure(args, Path(tmp)) | {"peak_mib": peaks}
    load, lines = [*load, os.getloadavg()[0]], table(result)
    sizes = ", ".join(f"{name} {getattr(args, name)}" for name in SIZES)
    facts = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(args.device) if on_gpu else None,
        "precision": args.precision,
        "plain_precision": args.plain_precision,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load": load,
        "sizes": {name: getattr(args, name) for name in SIZES},
        "video_dims": args.dims,
        "clips_real_frames": result["fill"],
    }
    top = result["ceiling_gflops"]
    print(
        f"{args.preset}: {sizes}; {args.batch_size * args.n_pair} clips, real frames "
        f"{100 * result['fill']:.0f} %\n{facts['gpu'] or args.device}, {args.precision}, plain "
        f"{args.plain_precision}; {facts['threads']} of {facts['cores']} cores, load "
        f"{load[0]:.1f} to {load[1]:.1f}, median of {args.repeats}; matrix product "
        f"{top['wall']:.0f} GFLOP/s by wall, {top['cpu']:.0f} by processor time\n"
    )
    print("\n".join(lines))
    if peaks:
        print(
            "\npeak memory above weights and batch, MiB: "
            + ", ".join(
                f"{way} {'failed' if mib is None else round(mib)}" for way, mib in peaks.items()
            )
        )
    if row := result["in_a_row_ms"]:
        n = args.batch_size * args.n_pair
        print(
            "in a row: "
            + ", ".join(
                f"{name} {ms:.1f} ms a step, {1e3 * n / ms:.0f} clips a s"
                for name, ms in row.items()
            )
            + f"; ours / plain {row['ours'] / row['plain']:.2f}, / the fastest other "
            f"{row['ours'] / min(ms for name, ms in row.items() if name != 'ours'):.2f}"
        )
    if args.json:
        everything = json.loads(args.json.read_text()) if args.json.exists() else {}
        name = f"{args.preset}, " + (facts["gpu"] or f"{facts['threads']} threads")
        args.json.write_text(json.dumps(everything | {name: facts | result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
