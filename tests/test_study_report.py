"""The report of a study, on a made-up study folder; the page it is written with; the bootstrap."""

import json

import numpy as np
import torch

from mcn_ext.metrics import ranks, summarize
from mcn_ext.reference import unit_rows
from mcn_ext.store import StoreWriter
from mcn_ext.study_runs import LETTERS, MAIN

FOODS = "onion carrot egg rice chicken lemon butter garlic basil salmon".split()
VERBS = "chop fry boil peel whisk".split()
EVIL = "<script>alert('x')</script> | fry & *boil*"


# ------------------------------------------------------------------------ a study, made up
def write_eval_store(path, n, seed=0):
    rng = np.random.default_rng(seed)
    streams = {"2d": {"dim": 4, "rate_hz": 1.0}, "mel": {"dim": 40, "rate_hz": 100.0}}
    writer = StoreWriter(path, streams, "test data")
    meaning = {word: rng.normal(size=16) for word in VERBS + FOODS}
    content = np.zeros((n, 16))
    for i in range(n):
        text = EVIL if i == 0 else f"now {rng.choice(VERBS)} the {rng.choice(FOODS)} and " \
            f"{rng.choice(FOODS)}"
        writer.add(f"clip{i:04d}", {"2d": rng.normal(size=(2, 4)), "mel": None}, [0.0], [1.9],
                   [text])
        content[i] = sum(meaning.get(word, 0) for word in text.split())
    writer.close()
    return content + rng.normal(size=content.shape)


def write_run(folder, modalities, quality, content, *, seed, args=None, start=10.0, steps=8):
    """A run folder as training and evaluation leave it; ``quality``: signal to noise."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    (folder / "args.json").write_text(json.dumps(
        {"batch_size": 16, "n_pair": 8, "lr": 0.002, "seed": seed, "cluster_size": 64,
         "similarity": "cosine", "demo": False, **(args or {})}))
    rows = [{"step": 10 * (i + 1), "epoch": i // 4 + 1, "lr": 1e-3,
             "total": start * 0.93 ** i + rng.normal(0, 0.1),
             "contrastive": 0.9 * start * 0.93 ** i + rng.normal(0, 0.1),
             "cluster": 0.0 if i < 2 else 0.8, "reconstruction": 0.1, "clips_per_s": 640.0,
             "data_wait": 0.05, **({"live_clusters": 60, "largest_share": 0.05} if i >= 2 else {}),
             **{f"rank_{m}": 20.0 + i for m in modalities}} for i in range(steps)]
    rows.insert(3, {"step": 31, "epoch": 1, "skipped": "the loss is not finite"})
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    n, width = content.shape
    gap = np.eye(width)
    embedding = {m: torch.from_numpy(quality * content + 2 * rng.normal(size=(n, width)) * (
        1.0 + 0.5 * (m == "audio")) + 3 * gap[i]) for i, m in enumerate(modalities)}
    valid = {m: np.ones(n, bool) for m in modalities}
    if "audio" in valid:
        valid["audio"][5] = False
    unit = {m: unit_rows(x.float()) for m, x in embedding.items()}
    directions = [f"{a}->{b}" for a in modalities for b in modalities if a != b]
    if len(modalities) == 3:
        directions = [MAIN, "video+audio->text", *directions]
    measured, arrays = {"n": n, "data": "eval.h5"}, {}
    for direction in directions:
        query, found = (sum(unit[m] for m in side.split("+")) for side in direction.split("->"))
        arrays[f"rank:{direction}"] = rank = ranks(query @ found.T)
        measured[direction] = summarize(rank, resamples=20)
    (folder / "metrics.json").write_text(json.dumps({"youcook2": measured}))
    arrays |= {f"embedding:{m}": x.half().numpy() for m, x in embedding.items()}
    np.savez(folder / "youcook2.npz", **arrays, **{f"valid:{m}": v for m, v in valid.items()})


METHODS = {  # label, order, encoders, quality
    "AV_T": ("AV then T, frozen", "AV_T", "frozen", 1.2),
    "AV_T-finetune": ("AV then T, finetuned", "AV_T", "finetune", 1.25),
    "VT_A": ("VT then A, frozen", "VT_A", "frozen", 0.9),
    "VT_A-finetune": ("VT then A, finetuned", "VT_A", "finetune", 0.9),
    "AT_V": ("AT then V, frozen", "AT_V", "frozen", 0.7),
    "AT_V-finetune": ("AT then V, finetuned", "AT_V", "finetune", 0.8),
    "AVT-30": ("one stage, equal steps", "AVT", None, 1.0),
    "AVT-23": ("one stage, equal compute", "AVT", None, 0.95),
}


def write_study(root, *, cells=None, methods=METHODS, seeds=(0, 1, 2), n=120, quality=None):
    """A study folder; ``quality(cell, method)`` overrides METHODS'."""
    root.mkdir(parents=True, exist_ok=True)
    content = write_eval_store(root / "eval.h5", n)
    cells = cells or [{"name": "", "data": "train.h5", "youcook2": str(root / "eval.h5"),
                       "video_noise": None, "audio_noise": None}]
    runs = []
    for cell in cells:
        for seed in seeds:
            for number, method in enumerate(methods):
                label, order, encoders, signal = METHODS[method]
                signal = quality(cell, method) if quality else signal
                where = f"{cell['name'] or 'runs'}/seed{seed}"
                first = order.split("_")[0] if "_" in order else None
                stage1 = f"{where}/stage1-{first}" if first else None
                if first and not (root / stage1).exists():
                    write_run(root / stage1, [LETTERS[x] for x in first], 0.8, content, seed=seed,
                              args={"pair": first})
                write_run(root / where / method, ["video", "audio", "text"], signal, content,
                          seed=100 * seed + number, start=8.0, steps=4 if first else 12,
                          args={"lr": 0.001} if method == "AVT-23" else {})
                runs.append({
                    "cell": cell["name"], "method": method, "order": order, "encoders": encoders,
                    "seed": seed, "label": label, "stage1": stage1, "run": f"{where}/{method}",
                    "flops": 1.5e12, "epochs": [20, 10] if first else [30],
                    **({} if first else {"equal": "steps"} if method == "AVT-30" else
                       {"equal": "compute", "baseline_of": ["AV_T", "AT_V"]})})
    (root / "study.json").write_text(json.dumps({
        "format": "mcn-study", "version": 1, "command": "python -m mcn_ext.study --seeds 3",
        "flags": {}, "cells": cells, "runs": runs}))
    return root
