"""Which pair first, before any training: how much two modalities' raw features tell of each other.

    python -m mcn_ext.study --predict --data data/howto100m.h5

For each pair of modalities, three numbers, from about CLIPS training clips, in seconds:

- ``cca``: the chance that a clip's own partner agrees more than another's, by canonical
  correlations of other videos (0.5: features tell nothing; 1: all).
- ``clean``: at least this share of the pairs belongs together, see :func:`wrong_share`. A clip's
  neighbours are like it, so a pair that is misaligned within its video counts as wrong in part.
- ``knn``: how many of a clip's K nearest neighbours are the same in both modalities (mutual k-NN,
  Huh et al., ICML 2024, arXiv 2405.07987; K / clips: nothing).

The hypothesis: the pair with the highest number is the least noisy, and best first. A study notes
the prediction before it trains, and its report says how often it held.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from itertools import combinations, product
from math import isfinite, log, nan
from pathlib import Path

import numpy as np

from mcn_ext.data.clips import ClipReader, TrainingClips, missing_inputs
from mcn_ext.data.store import Store, StoreError
from mcn_ext.modalities import MODALITIES
from mcn_ext.study.statistics import Study, mean
from mcn_ext.train.inputs import audio_streams

CLIPS, DIMENSIONS, K = 2000, 128, 10
RIDGE = 0.1  # of a feature's mean variance
# The pair of stage 1: what stage 2 adds. Order AV_T: audio and video first, then text.
THIRD = {"AV": "T", "VT": "A", "AT": "V"}


def sample(settings: argparse.Namespace, path: Path) -> tuple[dict, dict, np.ndarray]:
    """Clips of evenly spaced videos, as a first epoch draws them: {letter: raw features (n, d)},
    {letter: usable (n,) bool}, and the video of each clip (n,)."""
    store, audio = Store(path), audio_streams(settings)
    if lack := missing_inputs(store, "AVT", audio, settings.text):
        raise SystemExit(f"{path}: {lack}")
    reader = ClipReader(
        store,
        "VA" if settings.text == "words" else "VAT",
        audio_streams=audio,
        text=settings.text,
        audio_frames=settings.audio_frames,
    )
    clips = TrainingClips(
        reader, n_pair=settings.n_pair, min_time=settings.min_time, seed=settings.seed
    )
    if not len(clips):
        raise SystemExit(f"{path}: no video in it has captions; prepare it with captions")
    every = max(1, len(clips) * settings.n_pair // CLIPS)
    chosen = range(0, len(clips), every)
    items = [clips[0, i] for i in chosen]
    first_caption = [store.caption_times(int(clips.videos[i]))[0] for i in chosen]
    captions = []
    for item, first, i in zip(items, first_caption, chosen, strict=True):
        texts = store.caption_texts(int(clips.videos[i]))
        for clip in item["clip_id"].tolist():  # first caption << 20 | how many more follow
            begin = (clip >> 20) - first
            captions.append(" ".join(texts[begin : begin + 1 + (clip & (1 << 20) - 1)]))
    features, usable = {}, {}
    for letter, name in (("V", "video"), ("A", "audio")):
        usable[letter] = np.concatenate([item[f"valid.{name}"] for item in items])
        streams = [key for key in items[0] if key.startswith(f"{name}.")]
        parts = [np.concatenate([item[key] for item in items]).astype(float) for key in streams]
        features[letter] = np.hstack(parts) if parts else np.concatenate(list(map(sound, items)))
    if settings.text == "words":
        features["T"], usable["T"] = bag_of_words(captions)
    else:
        features["T"] = np.concatenate([mean_token(item) for item in items])
        usable["T"] = np.concatenate([item["valid.text"] for item in items])
    return features, usable, np.repeat(np.arange(len(items)), [len(i["clip_id"]) for i in items])


def sound(item: dict) -> np.ndarray:
    """Mean, deviation and maximum over time of each band of a spectrogram: (n, 120)."""
    rows = []
    for mel, frames in zip(item["audio"].astype(float), item["n_frames"], strict=True):
        mel = mel[:, : max(frames, 1)]
        rows.append(np.concatenate([mel.mean(1), mel.std(1), mel.max(1)]))
    return np.stack(rows)


def mean_token(item: dict) -> np.ndarray:
    """Mean of a clip's caption features (n, d)."""
    mask = item["text_mask"][..., None]
    return (item["text"] * mask).sum(1, dtype=float) / np.maximum(mask.sum(1), 1)


def bag_of_words(captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(n, words) weights of the words of at least two captions, rare words heavier (tf-idf), and
    which captions have any."""
    bags = [set(re.findall(r"\w+", text.lower())) for text in captions]
    count: dict[str, int] = {}
    for word in (word for bag in bags for word in bag):
        count[word] = count.get(word, 0) + 1
    # The most frequent, should there be more than a matrix can hold.
    kept = sorted((w for w in count if count[w] > 1), key=lambda w: (-count[w], w))[:4096]
    column = {word: i for i, word in enumerate(kept)}
    rows = np.zeros((len(bags), len(kept)))
    for row, bag in zip(rows, bags, strict=True):
        for word in bag & column.keys():
            row[column[word]] = np.log(len(bags) / count[word])
    return rows, rows.any(axis=1)


def _whiten(x: np.ndarray, fit: np.ndarray) -> np.ndarray:
    """Coordinates along the DIMENSIONS largest principal axes of x[fit], of about unit variance."""
    x = x - x[fit].mean(axis=0)
    _, spread, axes = np.linalg.svd(x[fit], full_matrices=False)
    axes, variance = axes[:DIMENSIONS], spread[:DIMENSIONS] ** 2 / max(1, fit.sum())
    return x @ axes.T / np.sqrt(variance + RIDGE * variance.mean() + 1e-12)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def p_values(x: np.ndarray, y: np.ndarray, video: np.ndarray) -> np.ndarray:
    """Of each pair (x_i, y_i): the share of pairs of different clips that agree at least as much,
    (n,). Near 0 for a pair that belongs together, uniform on [0, 1] for one that does not.

    Agreement is by canonical correlations, fitted on half of the videos and asked on the other
    half, both ways, so that no pair is judged by a fit that has seen it.
    """
    p = np.ones(len(x))
    for half in (0, 1):
        fit = video % 2 == half
        a, b = _whiten(x, fit), _whiten(y, fit)
        left, correlation, right = np.linalg.svd(a[fit].T @ b[fit] / fit.sum(), full_matrices=False)
        # Directions count by how much they correlate.
        a, b = _unit(a[~fit] @ left * correlation), _unit(b[~fit] @ right.T * correlation)
        similarity = a @ b.T
        # A clip that is near to all clips is no evidence.
        similarity -= similarity.mean(axis=0) + similarity.mean(axis=1, keepdims=True)
        others = np.sort(similarity[~np.eye(len(similarity), dtype=bool)])
        # Ties count by half.
        own = np.diagonal(similarity)
        below = [np.searchsorted(others, own, side=side) for side in ("left", "right")]
        p[~fit] = 1 - (below[0] + below[1]) / (2 * len(others))
    return p


def wrong_share(p: np.ndarray) -> float:
    """Share of pairs that do not belong together, of their p-values: twice the share above 1/2,
    where half of the wrong pairs lie (Storey 2002). At most so many: right pairs that features
    cannot tell lie there, too."""
    return float(min(1.0, 2 * ((p > 0.5).mean() + 0.5 * (p == 0.5).mean())))


def knn(x: np.ndarray, y: np.ndarray) -> float:
    """Share of each clip's K nearest neighbours that x and y have in common."""
    everything = np.ones(len(x), bool)
    nearest = []
    for rows in (x, y):
        rows = _unit(_whiten(rows, everything))
        similarity = rows @ rows.T
        np.fill_diagonal(similarity, -np.inf)
        nearest.append(np.argpartition(-similarity, K, axis=1)[:, :K])
    both = [len(set(a) & set(b)) for a, b in zip(*(n.tolist() for n in nearest), strict=True)]
    return float(np.mean(both)) / K


def probes(settings: argparse.Namespace, path: Path) -> dict[str, dict[str, float]]:
    """{"cca", "clean", "knn": {pair: number}}; a pair without enough clips is left out."""
    features, usable, video = sample(settings, path)
    found: dict[str, dict[str, float]] = {"cca": {}, "clean": {}, "knn": {}}
    for letters in combinations("AVT", 2):
        pair = next(p for p in THIRD if set(p) == set(letters))
        there = usable[pair[0]] & usable[pair[1]]
        x, y = (features[letter][there] for letter in pair)
        even = video[there] % 2 == 0
        if min(even.sum(), (~even).sum()) <= 2 * K:
            continue
        p = p_values(x, y, video[there])
        found["cca"][pair] = round(1 - float(p.mean()), 4)
        found["clean"][pair] = round(1 - wrong_share(p), 4)
        found["knn"][pair] = round(knn(x, y), 4)
    return found


def orders(scores: dict[str, float]) -> list[str]:
    """The orders, that of the highest pair first."""
    return [f"{pair}_{THIRD[pair]}" for pair in sorted(scores, key=lambda p: -scores[p])]


def report(found: dict[str, dict[str, float]], seconds: float) -> str:
    """The prediction in words."""
    lines = [f"{'pair':6}" + "".join(f"{name:>8}" for name in found)]
    for pair in THIRD:
        cells = [
            f"{scores[pair]:8.3f}" if pair in scores else f"{'-':>8}" for scores in found.values()
        ]
        lines.append(f"{pair:6}" + "".join(cells))
    for name, scores in found.items():
        lines.append(f"by {name}: {', then '.join(orders(scores)) or 'too few clips'}")
    wrong = [f"{pair} {1 - clean:.0%}" for pair, clean in found["clean"].items()]
    lines.append(f"pairs that do not belong together, at most: {', '.join(wrong)}")
    return "\n".join([*lines, f"{seconds:.1f} s"])


def with_probes(cells: list[dict], settings: argparse.Namespace, file: Path) -> list[dict]:
    """A study's cells with their :func:`probes`, printed. Those that its study.json has are
    kept: they were noted before training."""
    try:
        noted = {c["data"]: c["probes"] for c in json.loads(file.read_text())["cells"]}
    except (OSError, ValueError, KeyError, TypeError):
        noted = {}
    out = []
    for cell in cells:
        begin = time.monotonic()
        try:
            found = noted.get(cell["data"]) or probes(settings, Path(cell["data"]))
        except StoreError as error:
            raise SystemExit(str(error)) from None
        print(f"{cell['data']}:\n{report(found, time.monotonic() - begin)}", flush=True)
        out.append(cell | {"probes": found})
    return out


# ------------------------------------------------------------------- how often the prediction held
def probes_of(study: Study, cell: dict) -> dict[str, dict[str, float]]:
    """{probe: {pair: number}} of a cell, the higher the cleaner: those noted before training;
    "loss": 1 - L / (2 log N), with L the contrastive loss at the end of stage 1's first epoch, N
    the clips per step, and 2 log N the loss of equal logits; "stage1": R@10 of the pair after
    stage 1, mean of both directions. Both are averaged over seeds."""
    found = {probe: dict(scores) for probe, scores in (cell.get("probes") or {}).items()}
    values: dict[tuple[str, str], dict[int, float]] = {}
    for run in study.runs:
        if run.cell == (cell["name"] if study.grid else "") and run.first:
            pair, clips = run.order[:2], run.first.clips_per_step
            rows = [row for row in run.first.log if "total" in row]
            # The last row of epoch 1; if that epoch has logged none, the first row.
            rows = [row for row in rows if row.get("epoch") == 1][-1:] or rows[:1]
            if rows and clips > 1:
                loss = 1 - rows[0]["contrastive"] / (2 * log(clips))
                values.setdefault(("loss", pair), {})[run.seed] = loss
            a, b = (MODALITIES[letter].name for letter in pair)
            both = mean(run.first.recall(way) for way in (f"{a}->{b}", f"{b}->{a}"))
            if isfinite(both):
                values.setdefault(("stage1", pair), {})[run.seed] = both
    for (probe, pair), of in values.items():
        found.setdefault(probe, {})[pair] = mean(of.values())
    # Ranking the orders needs all three pairs.
    return {probe: scores for probe, scores in found.items() if len(scores) == 3}


def predictions(study: Study) -> list[dict]:
    """One row for each cell, probe and "family" (kind of stage 2, fusion) with all three orders:
    the "predicted" and the "measured" orders, best first; Kendall's "tau" (1: the same, -1:
    reversed); "margins", for each two orders (difference of the probe, difference of R@10, its 95 %
    interval), with the sign that makes the probe's difference positive."""
    rows = []
    for cell in study.cells:
        name = cell["name"] if study.grid else ""
        families = [family for family in study.families(name) if len(family["methods"]) == 3]
        for (probe, scores), family in product(probes_of(study, cell).items(), families):
            measured = [study.orders[method] for method in family["methods"]]
            recalls = {m: family["recalls"][m].mean() for m in family["methods"]}
            recalls = {study.orders[method]: value for method, value in recalls.items()}
            agree = [
                np.sign(scores[a[:2]] - scores[b[:2]]) * np.sign(recalls[a] - recalls[b])
                for a, b in combinations(measured, 2)
            ]
            row = {"cell": name, "probe": probe, "tau": float(np.mean(agree))}
            row["family"] = f"{family['kind']}, {family['fusion']}"
            margins = []
            for pair in family["pairs"]:
                first, second = (study.orders[pair[key]] for key in "ab")
                cleaner = scores[first[:2]] - scores[second[:2]]
                sign = 1 if cleaner >= 0 else -1
                ends = sorted(sign * end for end in pair["ci95"])
                margins.append((abs(cleaner), sign * pair["difference"], ends))
            row["margins"] = margins
            # By name first: where scores are equal, the measured order must not help.
            predicted = sorted(sorted(measured), key=lambda order: -scores[order[:2]])
            rows.append(row | {"predicted": predicted, "measured": measured})
    return rows


def predictive_power(rows: list[dict]) -> list[dict]:
    """Of :func:`predictions`, for each probe and family over all cells: how often ("hits" of "n")
    the predicted best order was best; the mean "tau"; "unseen", the leave-one-cell-out tau: the
    other cells' tau decides whether the highest or the lowest number goes first. NaN with one
    cell."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["probe"], row["family"]), []).append(row)
    power = []
    for (probe, family), of in groups.items():
        taus = np.array([row["tau"] for row in of])
        direction = np.sign(taus.sum() - taus)
        unseen = float((taus * direction).mean()) if len(of) > 1 else nan
        hits = sum(row["predicted"][0] == row["measured"][0] for row in of)
        row = {"probe": probe, "family": family, "hits": hits, "n": len(of)}
        power.append(row | {"tau": float(taus.mean()), "unseen": unseen})
    return power
