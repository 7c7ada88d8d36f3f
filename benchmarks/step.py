"""One training step taken apart, ours beside a plain implementation of the published step.

    python benchmarks/step.py --preset demo
    python benchmarks/step.py --preset digits --data digits/train.h5
    python benchmarks/step.py --preset paper --batch_size 1 --n_pair 8 --cluster_size 64

Sizes are the preset's, each changed by its flag; --json adds the result to a file. Without --data,
demo is the demo data, others made-up clips of full length. Loading is the same, not compared.

The plain step is written anew from its description (Chen et al. 2021): spectrograms padded to
--audio_frames, nn.Conv2d and nn.BatchNorm2d, dot products as N x N matrices with an eye made on the
host, k-means from scratch at each refit, mean squared errors, torch.optim.Adam.

Time: median of the repeats, in each of which the implementations take turns; wall, and processor
time, which the machine's other work changes less. k-means: a refit divided by --refit_every.
GFLOP: counted as executed, from shapes (a multiply and an add are 2). The ceiling is a matrix
product of 1536 cubed, fp32, in the same repeats and threads; fractions of it are by processor time.
Memory (Linux): growth of VmHWM over VmRSS in a step, in a process of its own after a warm-up step.
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
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a checkout that was built in place, not installed

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from mcn_ext import flags  # noqa: E402
from mcn_ext.clustering import spherical_kmeans  # noqa: E402
from mcn_ext.data import ClipReader, TrainingClips, collate, to_device  # noqa: E402
from mcn_ext.encoders import GatedUnit, reconstruction_head  # noqa: E402
from mcn_ext.guard import Guard  # noqa: E402
from mcn_ext.microbatch import MicroBatched  # noqa: E402
from mcn_ext.model import MCN  # noqa: E402
from mcn_ext.objective import Objective  # noqa: E402
from mcn_ext.store import Store, StoreWriter  # noqa: E402
from mcn_ext.words import WordVectors  # noqa: E402

NAMES = ("video", "audio", "text")
DIGITS = dict(batch_size=16, n_pair=6, lr=2e-3, embd_dim=256, recon_dim=1024, audio_width=0.25,
              audio_frames=400, min_time=0.5, cluster_size=64, temperature=0.1, recon_weight=5.0,
              cluster_weight=0.3)
PRESETS = flags.PRESETS | {"digits": flags.PRESETS["paper"] | DIGITS}  # the README's command
SIZES = {**dict.fromkeys(("batch_size", "n_pair", "audio_frames", "embd_dim", "recon_dim",
                          "cluster_size"), int), "audio_width": float}


class Clock:
    """Seconds of a step's parts, wall and processor, and what FlopCounterMode counts in them."""

    def __init__(self):
        self.wall, self.cpu = defaultdict(list), defaultdict(list)
        self.flops, self.counting = {}, False

    @contextmanager
    def __call__(self, part: str):
        cpu, wall = time.process_time(), time.perf_counter()
        with FlopCounterMode(display=False) if self.counting else nullcontext() as counter:
            yield
        self.wall[part].append(1e3 * (time.perf_counter() - wall))
        self.cpu[part].append(1e3 * (time.process_time() - cpu))
        if self.counting:
            self.flops[part] = counter.get_total_flops()


# ------------------------------------------------------------------------------------------ data
def make_store(path: Path, args, n_captions: int) -> Path:
    """Videos of clips that all are as long as the audio that is used of them."""
    seconds, rng = args.audio_frames / 100, np.random.default_rng(0)
    specs = {name: {"dim": dim, "rate_hz": rate} for (name, dim), rate in
             zip(args.dims.items(), (1.0, 1.5), strict=False)} | {"mel": {"dim": 40,
                                                                          "rate_hz": 100.0}}
    writer = StoreWriter(path, specs, "benchmark data")
    start = np.arange(n_captions) * seconds
    for video in range(args.batch_size):
        rows = {name: rng.uniform(-80 * (name == "mel"), name != "mel", (
            math.ceil(n_captions * seconds * spec["rate_hz"]) + 1, spec["dim"]))
            for name, spec in specs.items()}
        words = [" ".join(f"w{i}" for i in rng.integers(0, 999, args.max_words)) for _ in start]
        writer.add(f"v{video}", rows, start, start + seconds, words)
    return writer.close()


class Clips:
    """Batches of a store, read as a training run reads them."""

    def __init__(self, args, folder: Path):
        if args.data is None and args.preset == "demo":
            from mcn_ext.prepare import demo
            demo.prepare(folder)
            args.data = folder / "train.h5"
        path = args.data or make_store(folder / "train.h5", args, 2 * args.n_pair)
        store = Store(path)
        args.dims = {name: dim for name, dim in store.dims.items() if name != "mel"}
        texts = sorted({word for video in range(len(store)) for text in store.caption_texts(video)
                        for word in text.split()})
        vectors = np.random.default_rng(0).normal(size=(len(texts), 300)).astype(np.float32)
        self.words, self.store = WordVectors(texts, vectors, "random"), store
        reader = ClipReader(store, video_streams=tuple(args.dims), audio=True, words=self.words,
                            audio_frames=args.audio_frames, max_words=args.max_words)
        self.clips = TrainingClips(reader, n_pair=args.n_pair, min_time=args.min_time, seed=0)
        self.table, self.n, self.read_ = torch.from_numpy(vectors), args.batch_size, 0

    def read(self) -> dict:
        self.read_ += 1
        order = np.random.default_rng(self.read_).permutation(len(self.clips))
        return collate([self.clips[self.read_, int(i)] for i in order[:self.n]])


# ----------------------------------------------------------------------------------- both steps
class Ours:
    """train_stage1.py's step, part by part."""

    def __init__(self, args, clips: Clips, folder: Path):
        torch.manual_seed(0)
        self.clips, self.micro = clips, args.micro_batch
        self.model = MCN("AVT", video_dims=args.dims, embd_dim=args.embd_dim,
                         recon_dim=args.recon_dim, audio_width=args.audio_width)
        self.objective = Objective(list(NAMES), list(NAMES), cluster_size=args.cluster_size,
                                   queue_size=args.queue_size, temperature=args.temperature,
                                   cluster_weight=args.cluster_weight,
                                   recon_weight=args.recon_weight, refit_every=10**9)
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-4, fused=True)
        self.guard = Guard(self.model, self.objective, self.optimizer,
                           torch.amp.GradScaler("cpu", enabled=False), folder)
        self.net = MicroBatched(self.model, self.micro, nullcontext) if self.micro else None
        self.model.train()

    def step(self, clock, batch):
        with clock("transfer"):
            batch = to_device(batch, torch.device("cpu"), self.clips.table)
        self.guard.before()
        found = {}
        if self.micro:
            with clock("encoders forward"):
                embeddings, errors = self.net(batch)
        else:
            for name in NAMES:
                with clock(f"{name} forward"):
                    found[name] = self.model.embed(name, batch)
            embeddings, errors = ({name: ends[side].detach().requires_grad_()
                                   for name, ends in found.items()} for side in (0, 1))
        with clock("losses"):
            total = self.objective(embeddings, errors, batch)["total"]
            total.backward()
        if self.micro:
            with clock("encoders backward"):
                self.net.backward()
        for name, ends in found.items():
            with clock(f"{name} backward"):
                torch.autograd.backward(ends, [embeddings[name].grad, errors[name].grad])
        with clock("optimiser"):
            self.guard.check(total)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.objective.enqueue()

    def refit(self, queue, k):
        clusters = self.objective.clusters
        clusters.centroids, _ = spherical_kmeans(queue, k, init=clusters.centroids)


class PlainBlock(nn.Module):
    def __init__(self, dim_in, dim_out, stride):
        super().__init__()
        def conv(a, b, width, step):
            layer = nn.Conv2d(a, b, (1, width), (1, step), (0, width // 2), bias=False)
            return nn.Sequential(layer, nn.BatchNorm2d(b))
        self.first, self.second = conv(dim_in, dim_out, 9, stride), conv(dim_out, dim_out, 9, 1)
        self.shortcut = (nn.Identity() if stride == 1 and dim_in == dim_out
                         else conv(dim_in, dim_out, 1, stride))

    def forward(self, x):
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


class Plain:
    """The published step: one stage, three modalities."""

    def __init__(self, args, clips: Clips):
        torch.manual_seed(0)
        self.args, self.clips, d = args, clips, args.embd_dim
        widths = [max(1, round(w * args.audio_width)) for w in (128, 128, 256, 512, 1024)]
        blocks = [PlainBlock(a, b, s) for w, b in zip(widths, widths[1:], strict=False)
                  for a, s in ((w, 2), (b, 1))]
        self.davenet = nn.Sequential(nn.Conv2d(1, widths[0], (40, 1), bias=False),
                                     nn.BatchNorm2d(widths[0]), nn.ReLU(), *blocks)
        last, dim = widths[-1], sum(args.dims.values())
        self.gate = {"video": GatedUnit(dim, d), "audio": nn.Sequential(
            GatedUnit(last, last), nn.Linear(last, d)), "text": GatedUnit(d, d)}
        self.word = nn.Linear(300, d)
        self.heads = {name: reconstruction_head(d, args.recon_dim, width)
                      for name, width in (("video", dim), ("audio", last), ("text", d))}
        self.model = nn.ModuleList([self.davenet, self.word, *self.gate.values(),
                                    *self.heads.values()])
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-4)
        self.centroids = None

    def features(self, name, batch):
        if name == "video":
            return torch.cat([F.normalize(x, dim=1) for x in batch["video"].values()], 1)
        if name == "text":
            return F.relu(self.word(batch["text"])).amax(1)
        return self.davenet(batch["audio"][:, None]).mean(dim=(2, 3))

    def step(self, clock, batch):
        with clock("transfer"):
            short = self.args.audio_frames - batch["audio"].shape[-1]
            batch["audio"] = F.pad(batch["audio"], (0, short))
            batch = to_device(batch, torch.device("cpu"), self.clips.table)
        ends, leaves = {}, {}
        for name in NAMES:
            with clock(f"{name} forward"):
                features = self.features(name, batch)
                x = self.gate[name](features)
                error = F.mse_loss(self.heads[name](x), features.detach())
            ends[name], leaves[name] = (x, error), x.detach().requires_grad_()
        with clock("losses"):
            total = sum(self.contrastive(leaves[a], leaves[b])
                        for a, b in (("video", "audio"), ("video", "text"), ("audio", "text")))
            if self.centroids is not None:
                labels = (sum(x.detach() for x in leaves.values()) / 3
                          @ self.centroids.t()).argmax(1)
                total = total + sum(F.cross_entropy(x @ self.centroids.t(), labels)
                                    for x in leaves.values())
            total.backward()
        for name, (x, error) in ends.items():
            with clock(f"{name} backward"):
                torch.autograd.backward([x, self.args.recon_weight * error],
                                        [leaves[name].grad, torch.ones(())])
        with clock("optimiser"):
            self.optimizer.step()
            self.optimizer.zero_grad()

    @staticmethod
    def contrastive(x, y):
        s, target = x @ y.t(), torch.arange(len(x))
        s = s - 0.001 * torch.from_numpy(np.eye(len(s), dtype=np.float32))
        return sum(F.nll_loss(F.log_softmax(z, 1), target) for z in (s, s.t()))

    def refit(self, queue, k):
        self.centroids = queue[torch.randperm(len(queue))[:k]]
        for _ in range(20):
            labels = (queue @ self.centroids.t()).argmax(1)
            sums = torch.zeros_like(self.centroids).index_add_(0, labels, queue)
            self.centroids = F.normalize(sums)


# ----------------------------------------------------------------------------------- measurement
def queue_of(args, seed: int) -> torch.Tensor:
    """As many rows as the queue holds, around more directions than there are centroids."""
    g = torch.Generator().manual_seed(seed)
    n, d, k = args.queue_size * args.batch_size * args.n_pair, args.embd_dim, 2 * args.cluster_size
    centres = F.normalize(torch.randn(k, d, generator=torch.Generator().manual_seed(0)))
    rows = centres[torch.randint(k, (n,), generator=g)]
    return F.normalize(rows + torch.randn(n, d, generator=g) / d**0.5)


def measure(args, folder: Path) -> dict:
    clips, fill = Clips(args, folder), []
    steps = {"plain": Plain(args, clips), "ours": Ours(args, clips, folder)}
    clocks, a = {name: Clock() for name in (*steps, "matmul")}, torch.randn(1536, 1536)
    for name, step in steps.items():  # warm-up, and the count
        step.refit(queue_of(args, 0), args.cluster_size)
        clocks[name].counting = True  # only here: it takes time
        step.step(clocks[name], clips.read())
    n = args.batch_size * args.n_pair  # what is compiled is not counted: 3 pairs, 3 cluster terms
    clocks["ours"].flops["losses"] = 6 * n * (3 * n + 2 * args.cluster_size) * args.embd_dim
    for clock in clocks.values():
        clock.counting = clock.wall.clear() or clock.cpu.clear()
    for repeat in range(args.repeats):
        for name, step in steps.items():
            clips.read_ = repeat  # the same clips for both
            with clocks[name]("load"):
                batch = clips.read()
            step.step(clocks[name], batch)
            with clocks[name]("k-means"):
                step.refit(queue_of(args, repeat + 1), args.cluster_size)
            for taken in (clocks[name].wall, clocks[name].cpu):
                taken["k-means"][-1] /= args.refit_every
        fill.append(float(batch["n_frames"].sum()) / len(batch["n_frames"]) / args.audio_frames)
        with clocks["matmul"]("matmul"):
            for _ in range(4):
                a @ a
    matmul = 4 * 2 * 1536**3 / 1e6
    ceiling = {kind: matmul / median(getattr(clocks["matmul"], kind)["matmul"])
               for kind in ("wall", "cpu")}
    rows = {name: {part: {"ms": median(clock.wall[part]), "cpu_ms": median(clock.cpu[part]),
                          "gflop": clock.flops.get(part, 0) / 1e9}
                   for part in clock.wall} for name, clock in clocks.items() if name in steps}
    return {"rows": rows, "ceiling_gflops": ceiling, "fill": median(fill)}


def peak(args, folder: Path) -> float:
    """MiB that a step takes above what is there before: weights, optimiser, batch."""
    def status(field):
        return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0])

    clips = Clips(args, folder)
    step = Plain(args, clips) if args.memory == "plain" else Ours(args, clips, folder)
    for _ in range(2):
        batch = clips.read()
        ctypes.CDLL(None).malloc_trim(0)
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        step.step(Clock(), batch)
    return (status("VmHWM") - before) / 1024


def table(result: dict) -> list[str]:
    plain, ours = result["rows"]["plain"], result["rows"]["ours"]
    top = result["ceiling_gflops"]["cpu"]
    lines = ["| part | plain, ms | ours, ms | ratio | by processor time | ours, GFLOP | GFLOP/s | "
             "of the ceiling |", "|---|---:|---:|---:|---:|---:|---:|---:|"]
    kinds = ("ms", "cpu_ms", "gflop")
    whole = [{kind: sum(row[kind] for part, row in rows.items() if part != "load")
              for kind in kinds} for rows in (plain, ours)]
    for way in ("forward", "backward"):  # of --micro_batch
        plain[f"encoders {way}"] = {kind: sum(plain[f"{name} {way}"][kind] for name in NAMES)
                                    for kind in kinds}
    named = [(part, plain[part], ours[part]) for part in ours]
    for part, p, o in [*named, ("**step** without load", *whole)]:
        rate = o["gflop"] / max(o["cpu_ms"], 1e-9) * 1e3
        work = (f"{o['gflop']:.2f} | {rate:.0f} | {rate / top:.2f}" if o["gflop"] > 0.01
                else "| | ")
        lines.append(f"| {part} | {p['ms']:.1f} | {o['ms']:.1f} | {o['ms'] / p['ms']:.2f} | "
                     f"{o['cpu_ms'] / max(p['cpu_ms'], 1e-9):.2f} | {work} |")
    result["ratio"] = {kind: whole[1][kind] / whole[0][kind] for kind in kinds}
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="demo")
    parser.add_argument("--data", type=Path)
    for name, kind in SIZES.items():
        parser.add_argument(f"--{name}", type=kind)
    parser.add_argument("--video_dims", type=int, nargs=2, default=(2048, 2048))
    parser.add_argument("--micro_batch", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--memory", choices=("plain", "ours"), help="print a step's peak, MiB")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    args = argparse.Namespace(**PRESETS[given.preset])
    for name, value in vars(given).items():
        if value is not None or not hasattr(args, name):
            setattr(args, name, value)
    args.dims = dict(zip(("2d", "3d"), args.video_dims, strict=True))
    with tempfile.TemporaryDirectory() as tmp:
        if args.memory:
            return print(f"{peak(args, Path(tmp)):.0f}")
        load = [os.getloadavg()[0]]
        result = measure(args, Path(tmp))
    load, lines = [*load, os.getloadavg()[0]], table(result)
    sizes = ", ".join(f"{name} {getattr(args, name)}" for name in SIZES)
    parts = args.micro_batch or args.batch_size * args.n_pair // 4
    result["peak_mib"], ways = {}, {"plain": ("plain", 0), "ours": ("ours", 0),
                                    f"ours, --micro_batch {parts}": ("ours", parts)}
    for way, (name, n) in ways.items():
        command = [sys.executable, __file__, *sys.argv[1:], "--memory", name, "--micro_batch", n]
        done = subprocess.run([str(x) for x in command], capture_output=True, text=True, check=True)
        result["peak_mib"][way] = float(done.stdout)
    facts = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(),
             "threads": torch.get_num_threads(), "torch": torch.__version__, "load": load,
             "sizes": {name: getattr(args, name) for name in SIZES},
             "video_dims": args.dims, "clips_real_frames": result["fill"]}
    top = result["ceiling_gflops"]
    print(f"{args.preset}: {sizes}; {args.batch_size * args.n_pair} clips, real frames "
          f"{100 * result['fill']:.0f} %\n{facts['threads']} of {facts['cores']} cores, load "
          f"{load[0]:.1f} to {load[1]:.1f}, median of {args.repeats}; matrix product "
          f"{top['wall']:.0f} GFLOP/s by wall, {top['cpu']:.0f} by processor time\n")
    print("\n".join(lines))
    print("\npeak memory above weights and batch, MiB: "
          + ", ".join(f"{way} {mib:.0f}" for way, mib in result["peak_mib"].items()))
    if args.json:
        everything = json.loads(args.json.read_text()) if args.json.exists() else {}
        name = f"{args.preset}, {facts['threads']} threads"
        args.json.write_text(json.dumps(everything | {name: facts | result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
