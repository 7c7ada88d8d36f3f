r"""Why multimodal clustering goes NaN: the published recipe step by step, our objective beside it.

    python benchmarks/nan.py              # the recipe until NaN, then ours twice as many steps
    python benchmarks/nan.py --times 10 --out benchmarks/results/nan-cpu.json \
        --figure docs/nan.png             # 17 minutes: the committed figure
    python benchmarks/nan.py --ablation   # each cure alone, five together, all but one, and ours
    python benchmarks/nan.py --draw benchmarks/results/nan-cpu.json

On synthetic rows and, where --digits is a store with streams 2d, 3d and mel, on its recordings.

The recipe (nan_recipe.py), written from its description: dot products without a temperature; matrix
products in fp16; every 20 steps k-means by fp16 cosines on the last 20 steps' features, from the
last centroids on; the mean of no rows set to 0 and inf to 3.4e38 by nan_to_num; a dynamic loss
scale that skips steps whose gradients are not finite; Adam. fp16 is emulated as tensor cores
compute: fp16 factors, sums in fp32, the result rounded to fp16.

All runs have the same encoders (a gated unit a modality, its output rounded to fp16 as under
autocast), the same clips in the same order and the same Adam. They are smaller than the published
run and so come to their end sooner: 256 dimensions, features pooled over time, 2048 clips a step,
learning rate 3e-3. "NaN" is the first step whose loss is NaN. R@10: audio from video among 1000
clips, fresh ones of the synthetic rows, training clips of the recordings.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a checkout that was built in place, not installed

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from tqdm import tqdm  # noqa: E402

from benchmarks.nan_recipe import (  # noqa: E402
    ABLATION,
    DIM,
    QUEUE,
    K,
    Recipe,
    half,
    title,
)
from mcn_ext.encoders import GatedUnit  # noqa: E402
from mcn_ext.evaluation.metrics import ranks  # noqa: E402
from mcn_ext.objective import Objective  # noqa: E402
from mcn_ext.reference import unit_rows  # noqa: E402


class Ours:
    """mcn_ext's objective, as train_stage1.py has it."""

    def __init__(self):
        self.objective = Objective(
            ["audio", "video"],
            ["audio", "video"],
            cluster_size=K,
            queue_size=QUEUE,
            recon_weight=0.0,
        )

    def __call__(self, video, audio, clip):
        valid = torch.ones(len(video), dtype=torch.bool)
        terms = self.objective(
            {"audio": audio, "video": video},
            {},
            {"valid": {"audio": valid, "video": valid}, "clip_id": clip},
        )
        self.terms = terms
        return terms.total, terms.contrastive, terms.cluster

    def after_step(self):
        self.objective.update_clusters(self.terms)

    @property
    def centroids(self):
        return self.objective.clusters.centroids

    @property
    def statistics(self):
        return self.objective.clusters.statistics


# ------------------------------------------------------------------------------------------- data
class Synthetic:
    """512 concepts seen and heard, each clip of one with a character of its own; half of the sounds
    belong to another clip. Features are not negative and share a direction (cosine 0.95)."""

    name = "synthetic rows"
    dims = {"video": 192, "audio": 120}

    def __init__(self):
        rng = np.random.default_rng(0)
        self.concepts = {m: rng.normal(0, 1, (512, d)) for m, d in self.dims.items()}
        self.characters = {m: rng.normal(0, 0.25, (32, d)) for m, d in self.dims.items()}

    def batch(self, n, rng):
        concept, character = rng.integers(0, 512, n), rng.normal(0, 1, (n, 32))
        other = np.where(rng.random(n) < 0.5, rng.permutation(n), np.arange(n))
        rows = {}
        for m, d in self.dims.items():
            of = other if m == "audio" else np.arange(n)
            x = 8 + self.concepts[m][concept[of]] + character[of] @ self.characters[m]
            x += rng.normal(0, 0.5, (n, d))
            rows[m] = F.normalize(torch.from_numpy(np.maximum(x, 0)).float())
        return rows, torch.from_numpy(rng.integers(0, 2**62, n))

    def held_out(self):
        return self.batch(1000, np.random.default_rng(2))[0]


class Digits:
    """Clips of a store: video features as the model takes them, moments of the spectrogram."""

    name = "spoken digits"

    def __init__(self, path):
        from mcn_ext.data.clips import ClipReader, collate, draw_spans
        from mcn_ext.data.store import Store

        store = Store(path)
        reader = ClipReader(store, "AV", video_streams=("2d", "3d"), audio_frames=400)
        items = []
        for video in np.flatnonzero(store.caption_counts()):
            _, start, end = store.caption_times(int(video))
            spans = draw_spans(start, end, len(start), 0.5, np.random.default_rng(0))
            items.append(reader.read(int(video), list(dict.fromkeys(spans))))
        batch = collate(items)
        good = batch["valid.audio"] & batch["valid.video"]
        frames = torch.arange(batch["audio"].shape[-1]) < batch["n_frames"][:, None]
        mel = batch["audio"].float().masked_fill(~frames[:, None], torch.nan)
        mean = mel.nanmean(2)
        spread = (mel - mean[..., None]).square().nanmean(2).sqrt()
        audio = torch.cat([mean, spread, mel.nan_to_num(-100).amax(2)], 1)[good]
        audio = ((audio - audio.mean(0)) / audio.std(0)).clamp(-3, 3) + 3
        video = torch.cat([F.normalize(batch[f"video.{s}"].float()) for s in ("2d", "3d")], 1)[good]
        self.rows = {"video": video, "audio": F.normalize(audio)}
        self.clip = batch["clip_id"][good]
        self.dims = {m: x.shape[1] for m, x in self.rows.items()}

    def batch(self, n, rng):
        draw = torch.from_numpy(rng.integers(0, len(self.clip), n))  # repeats, as published
        return {m: x[draw] for m, x in self.rows.items()}, self.clip[draw]

    def held_out(self):
        return {m: x[:1000] for m, x in self.rows.items()}


# --------------------------------------------------------------------------------------- the run
def train(name, objective, data, *, steps, lr, n_clips):
    """{"name", "nan_step" or None, "steps", "seconds", "r@10", "rows": a measurement a step}; ends
    once the loss was NaN for 5 steps."""
    torch.manual_seed(0)
    encoders = nn.ModuleDict({m: GatedUnit(d, DIM) for m, d in data.dims.items()})
    optimizer = torch.optim.Adam(encoders.parameters(), lr=lr)
    scaler = torch.amp.GradScaler("cpu")
    rng, rows, begin = np.random.default_rng(1), [], time.perf_counter()
    bar = tqdm(total=steps, desc=f"{data.name}: {name}", mininterval=2)
    while len(rows) < steps and sum(row["total"] != row["total"] for row in rows[-5:]) < 5:
        features, clip = data.batch(n_clips, rng)
        out = {m: half(encoders[m](x)) for m, x in features.items()}
        total, contrastive, cluster = objective(out["video"], out["audio"], clip)
        optimizer.zero_grad()
        scaler.scale(total).backward()
        scaler.step(optimizer)
        scaler.update()
        objective.after_step()
        with torch.no_grad():
            joint = unit_rows((out["video"] + out["audio"]) / 2)
            rows.append(
                {
                    "step": len(rows) + 1,
                    "total": float(total),
                    "contrastive": float(contrastive),
                    "cluster": float(cluster),
                    "loss_scale": scaler.get_scale(),
                    "cosine": float(joint.mean(0).square().sum()),  # mean over all pairs of clips
                    **{f"norm_{m}": float(e.norm(dim=1).mean()) for m, e in out.items()},
                    **objective.statistics,
                }
            )
        if objective.centroids is not None:
            rows[-1]["largest_entry"] = float(objective.centroids.abs().max())
        bar.update()
    bar.close()
    with torch.no_grad():
        x = data.held_out()
        similarity = (
            unit_rows(encoders["video"](x["video"])) @ unit_rows(encoders["audio"](x["audio"])).t()
        )
    rank = ranks(similarity)
    last = next((row for row in reversed(rows) if row["total"] == row["total"]), rows[-1])
    return {
        "name": name,
        "steps": len(rows),
        "seconds": time.perf_counter() - begin,
        "nan_step": next((r["step"] for r in rows if r["total"] != r["total"]), None),
        "r@10": float((rank <= 10).mean() * 100),
        "last": last,
        "rows": rows,
    }


def table(runs):
    """Markdown: what became of each run."""
    lines = [
        "| | NaN at step | of | live clusters | largest share | mean cosine | norm | R@10 |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for run in runs:
        last = run["last"]
        lines.append(
            f"| {run['name']} | {run['nan_step'] or 'never'} | {run['steps']} | "
            f"{last.get('live_clusters', '')} of {K} | {100 * last.get('largest_share', 0):.1f} % "
            f"| {last['cosine']:.2f} | {last['norm_video']:.3g} | {run['r@10']:.1f} % |"
        )
    return "\n".join(lines)


def draw(results, path):
    """What happens step by step, recipe and ours, a row of panels for each data set."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, grid = plt.subplots(
        len(results),
        4,
        figsize=(13, 2.7 * len(results) + 0.4),
        squeeze=False,
        layout="constrained",
        sharex=True,
    )
    for axes, (data, runs) in zip(grid, results.items(), strict=True):
        for run, colour, label in (
            (runs[0], "tab:red", "published recipe"),
            (runs[-1], "tab:blue", "ours"),
        ):
            rows = run["rows"]
            step = [row["step"] for row in rows]
            share = [100 * row.get("largest_share", np.nan) for row in rows]
            entry = [row.get("largest_entry", np.nan) for row in rows]
            axes[0].plot(step, share, color=colour, label=label)
            axes[1].plot(step, entry, color=colour)
            axes[2].plot(step, [row["norm_video"] for row in rows], color=colour)
            axes[2].plot(step, [row["norm_audio"] for row in rows], color=colour, linestyle=":")
            axes[3].plot(step, [row["contrastive"] for row in rows], color=colour)
            axes[3].plot(
                step,
                [row["cluster"] if row["step"] > QUEUE else np.nan for row in rows],
                color=colour,
                linestyle=":",
            )
        for axis in axes:
            axis.set_xscale("log")
            axis.grid(alpha=0.3)
            if runs[0]["nan_step"]:
                axis.axvline(runs[0]["nan_step"], color="tab:red", linewidth=0.8, linestyle="--")
        if runs[0]["nan_step"]:
            axes[3].annotate(
                f"NaN at step {runs[0]['nan_step']} ",
                (runs[0]["nan_step"], 0.3),
                xycoords=("data", "axes fraction"),
                ha="right",
                color="tab:red",
            )
        axes[1].set_yscale("log")
        axes[1].axhline(65504, color="grey", linewidth=0.8)
        axes[1].text(1.2, 65504 * 30, "fp16 ends: 65,504", color="grey", fontsize=8)
        axes[0].set_ylabel(data, fontweight="bold")
        axes[0].set_ylim(0, 105)
        axes[0].legend(frameon=False, loc="upper left")
    for axis, name in zip(
        grid[0],
        (
            "largest cluster, % of all clips",
            "largest centroid entry",
            "norm: video, audio (dotted)",
            "loss: contrastive, clustering (dotted)",
        ),
        strict=True,
    ):
        axis.set_title(name)
    for axis in grid[-1]:
        axis.set_xlabel("step (k-means every 20)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def thinned(run):
    """A run with each of its first 200 steps, then every tenth: a file that can be kept."""
    return run | {"rows": [r for r in run["rows"] if r["step"] <= 200 or r["step"] % 10 == 0]}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--digits", type=Path, default=Path("digits/train.h5"))
    parser.add_argument("--only", choices=("synthetic", "digits"))
    parser.add_argument("--ablation", action="store_true")
    parser.add_argument("--steps", type=int, default=400, help="at most, of all runs but ours")
    parser.add_argument(
        "--times",
        type=int,
        default=2,
        help="ours takes so many times the steps that the recipe took to NaN",
    )
    parser.add_argument("--clips", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--draw", type=Path, help="JSON file to draw; nothing runs")
    parser.add_argument("--figure", type=Path, default=Path("runs/nan.png"))
    args = parser.parse_args()
    if args.draw:
        draw(json.loads(args.draw.read_text())["data"], args.figure)
        return
    sets = [] if args.only == "digits" else [Synthetic()]
    if args.only != "synthetic" and args.digits.exists():
        sets.append(Digits(args.digits))
    elif args.only != "synthetic":
        print(f"no recordings at {args.digits}: synthetic rows only")
    results = {}
    for data in sets:

        def run(name, objective, steps, data=data):
            return train(name, objective, data, steps=steps, lr=args.lr, n_clips=args.clips)

        runs = [run("the recipe", Recipe(), args.steps)]
        if args.ablation:
            runs += [run(title(cures), Recipe(cures), args.steps) for cures in ABLATION]
            runs.append(run("ours", Ours(), args.steps))
        else:
            runs.append(run("ours", Ours(), args.times * (runs[0]["nan_step"] or args.steps)))
        results[data.name] = [thinned(run) for run in runs]
        print(
            f"\n{data.name}: {args.clips} clips a step, {DIM} dimensions, K {K}, Adam {args.lr}, "
            f"{torch.get_num_threads()} threads; recipe {runs[0]['seconds']:.0f} s, ours "
            f"{runs[-1]['seconds']:.0f} s\n\n{table(runs)}\n"
        )
    machine = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "commit": subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip(),
    }
    if args.out:
        args.out.write_text(
            json.dumps(machine | {"clips": args.clips, "lr": args.lr, "data": results}) + "\n"
        )
    if not args.ablation:
        draw(results, args.figure)
        print(args.figure)


if __name__ == "__main__":
    main()
