r"""Why multimodal clustering goes NaN: the published recipe step by step, our objective beside it.

    python benchmarks/nan.py              # the recipe until NaN, then ours twice as many steps
    python benchmarks/nan.py --times 10 --figure docs/nan.png     # 17 minutes: the README's figure
    python benchmarks/nan.py --ablation   # each cure alone, five together, all but one, and ours

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
from pathlib import Path

import numpy as np
import torch
from common import QUICK, describe, save, show
from nan_recipe import ABLATION, DIM, QUEUE, K, Recipe, half, title
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from mcn_ext.encoders import GatedUnit
from mcn_ext.evaluation.metrics import ranks
from mcn_ext.objective import Objective
from mcn_ext.reference import unit_rows

STEPS, CLIPS = (60, 256) if QUICK else (400, 2048)  # at most, of all runs but ours; a step


class Ours:
    """mcn_ext's objective, as train_stage1.py has it."""

    centroids, statistics = None, {}

    def __init__(self):
        both = ["audio", "video"]
        self.objective = Objective(both, both, cluster_size=K, queue_size=QUEUE, recon_weight=0.0)

    def __call__(self, video, audio, clip):
        rows = {"audio": audio, "video": video}
        valid = {name: torch.ones(len(clip), dtype=torch.bool) for name in rows}
        self.terms = terms = self.objective(rows, {}, {"valid": valid, "clip_id": clip})
        return terms.total, terms.contrastive, terms.cluster

    def after_step(self):
        self.objective.update_clusters(self.terms)
        clusters = self.objective.clusters
        self.centroids, self.statistics = clusters.centroids, clusters.statistics


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
def train(name, objective, data, steps):
    """{"name", "nan_step" or None, "r@10", "rows": a measurement a step}; ends once the loss was
    NaN for 5 steps."""
    torch.manual_seed(0)
    encoders = nn.ModuleDict({m: GatedUnit(d, DIM) for m, d in data.dims.items()})
    optimizer = torch.optim.Adam(encoders.parameters(), lr=3e-3)
    scaler = torch.amp.GradScaler("cpu")
    rng, rows, nans = np.random.default_rng(1), [], []
    for step in tqdm(range(1, steps + 1), desc=f"{data.name}: {name}", mininterval=2):
        features, clip = data.batch(CLIPS, rng)
        out = {m: half(encoders[m](x)) for m, x in features.items()}
        total, contrastive, cluster = objective(out["video"], out["audio"], clip)
        optimizer.zero_grad()
        scaler.scale(total).backward()
        scaler.step(optimizer)
        scaler.update()
        objective.after_step()
        with torch.no_grad():
            joint = unit_rows((out["video"] + out["audio"]) / 2)
            row = {"step": step, "contrastive": float(contrastive), "cluster": float(cluster)}
            row["cosine"] = float(joint.mean(0).square().sum())  # mean over all pairs of clips
            row |= {f"norm_{m}": float(e.norm(dim=1).mean()) for m, e in out.items()}
        if objective.centroids is not None:
            row["largest_entry"] = float(objective.centroids.abs().max())
        rows.append(row | objective.statistics)
        nans += [step] if total.isnan() else []
        if len(nans) == 5:
            break
    with torch.no_grad():
        video, audio = (unit_rows(encoders[m](x)) for m, x in sorted(data.held_out().items())[::-1])
    found = {"name": name, "nan_step": nans[0] if nans else None}
    return found | {"r@10": float((ranks(video @ audio.t()) <= 10).mean() * 100), "rows": rows}


def summary(run):
    """What became of a run: its last step whose loss was a number."""
    nan = run["nan_step"]
    last = run["rows"][nan - 2 if nan else -1]
    return {
        "": run["name"],
        "NaN at step": nan or "never",
        "of": len(run["rows"]),
        "live clusters": last.get("live_clusters", ""),
        "largest share": last.get("largest_share", ""),
        "mean cosine": last["cosine"],
        "norm": last["norm_video"],
        "R@10": run["r@10"],
    }


def draw(results, path):
    """What happens step by step, recipe and ours, a row of panels for each data set."""
    from mcn_ext.train.curves import _pyplot, _save

    plt = _pyplot()
    if plt is None:
        return
    panels = {
        "largest cluster, share of all clips": ["largest_share"],
        "largest centroid entry": ["largest_entry"],
        "norm: video, audio (dotted)": ["norm_video", "norm_audio"],
        "loss: contrastive, clustering (dotted)": ["contrastive", "cluster"],
    }
    figure, grid = plt.subplots(
        len(results),
        len(panels),
        figsize=(13, 2.7 * len(results) + 0.4),
        squeeze=False,
        layout="constrained",
        sharex=True,
    )
    for axes, (data, runs) in zip(grid, results.items(), strict=True):
        nan = runs[0]["nan_step"]
        for axis, (name, keys) in zip(axes, panels.items(), strict=True):
            for run, colour in ((runs[0], "tab:red"), (runs[-1], "tab:blue")):
                for key, line in zip(keys, "-:", strict=False):
                    points = [
                        (row["step"], row[key])
                        for row in run["rows"]
                        if key in row and (key != "cluster" or row["step"] > QUEUE)
                    ]
                    axis.plot(*zip(*points, strict=True), line, color=colour, label=run["name"])
            if nan:
                axis.axvline(nan, color="tab:red", linewidth=0.8, linestyle="--")
            axis.set(xscale="log", title=name, xlabel="step (k-means every 20)")
        if nan:
            axes[3].set_title(f"NaN at step {nan}", loc="right", color="tab:red", fontsize=8)
        axes[0].set_ylabel(data, fontweight="bold")
        axes[0].legend(loc="upper left")
        axes[1].set_yscale("log")
        axes[1].axhline(65504, color="grey", linewidth=0.8)
        axes[1].text(1.2, 65504 * 30, "fp16 ends: 65,504", color="grey")
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"figure: {_save(figure, path)}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--digits", type=Path, default=Path("digits/train.h5"))
    add("--ablation", action="store_true")
    add("--times", type=int, default=2, help="ours: so many times the recipe's steps to NaN")
    add("--figure", type=Path, default=Path("runs/nan.png"))
    args = parser.parse_args()
    sets = [Synthetic()]
    if args.digits.exists():
        sets.append(Digits(args.digits))
    else:
        print(f"no recordings at {args.digits}: synthetic rows only")
    results = {}
    for data in sets:
        results[data.name] = runs = [train("the recipe", Recipe(), data, STEPS)]
        if args.ablation:
            runs += [train(title(cures), Recipe(cures), data, STEPS) for cures in ABLATION]
        steps = STEPS if args.ablation else args.times * (runs[0]["nan_step"] or STEPS)
        runs.append(train("ours", Ours(), data, steps))
        show(f"{data.name}, {CLIPS} clips a step", [summary(run) for run in runs])
    rows = {name: [summary(run) for run in runs] for name, runs in results.items()}
    save("nan-ablation" if args.ablation else "nan", describe() | {"data": rows})
    if not args.ablation:
        draw(results, args.figure)


if __name__ == "__main__":
    main()
