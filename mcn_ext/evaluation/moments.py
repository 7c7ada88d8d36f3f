"""Finding the place in a video: its windows ranked for a sentence, R@1 at three overlaps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from mcn_ext.data.store import Store
from mcn_ext.evaluation.metrics import check_finite, resample
from mcn_ext.evaluation.retrieval import WORDS, label, similarity
from mcn_ext.evaluation.words import bm25, reciprocal_ranks, spoken

LENGTHS = (5.0, 10.0, 20.0, 40.0)  # seconds; YouCook2's training segments: 8 of 10 lie within
STRIDE = 0.25
OVERLAPS = (0.3, 0.5, 0.7)
RECALLS = tuple(f"R@1 IoU {t}" for t in OVERLAPS)
# {video id: (start (n,) s, end (n,) s, sentences)}
Sentences = Mapping[str, tuple[np.ndarray, np.ndarray, list[str]]]


def windows(
    seconds: float, lengths: Sequence[float] = LENGTHS, stride: float = STRIDE
) -> np.ndarray:
    """Start and end (n, 2) s of windows of each length, one every ``stride`` of its length, the
    last of a length at the video's end. A video shorter than a length is one window of its own."""
    found = []
    for length in lengths:
        last, step = max(seconds - length, 0.0), stride * length
        # Less 1e-9: rounding must not add a window that is the last one again.
        begin = np.append(step * np.arange(np.ceil(last / step - 1e-9)), last)
        found.append(np.stack([begin, np.minimum(begin + length, seconds)], axis=1))
    # A video shorter than two lengths has the same window for both.
    return np.unique(np.concatenate(found), axis=0)


def overlap(stretches: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Intersection over union of stretches (n, 2) s with others (m, 2) s, (n, m); 0 where both are
    empty."""
    low = np.maximum(stretches[:, None, 0], other[None, :, 0])
    high = np.minimum(stretches[:, None, 1], other[None, :, 1])
    # high - low is negative where two stretches do not meet.
    both = np.maximum(high - low, 0)
    # |A or B| = |A| + |B| - |A and B|
    union = np.ptp(stretches, axis=1)[:, None] + np.ptp(other, axis=1)[None, :] - both
    return np.divide(both, union, out=np.zeros_like(both), where=union > 0)


def read_annotations(path: Path, subset: str) -> Sentences:
    """YouCook2's ``youcookii_annotations_trainval.json``: ``database`` -> id -> subset, duration,
    ``annotations`` [{segment [start, end] s, sentence}]. ``subset``: training, validation or all.
    SystemExit where it is something else."""
    found = {}
    try:
        for name, video in json.loads(path.read_text(encoding="utf-8"))["database"].items():
            if subset in ("all", video["subset"]):
                rows = video["annotations"]
                start, end = np.array([row["segment"] for row in rows], float).reshape(-1, 2).T
                if not ((0 <= start) & (start < end)).all():
                    raise ValueError(f"{name}: a segment is not 0 <= start < end")
                found[name] = start, end, [str(row["sentence"]) for row in rows]
    except Exception as error:  # of any JSON but the right one, a dozen types
        raise SystemExit(
            f"--annotations {path.absolute()}: cannot be read as YouCook2's annotations "
            f"({type(error).__name__}: {error})"
        ) from error
    if not found:
        raise SystemExit(f"--annotations {path}: no video of subset {subset}")
    return found


def captions_of(store: Store) -> Sentences:
    """The store's own captions, for stores prepared with sentences that describe. SystemExit if
    there is none."""
    found = {}
    for video, name in enumerate(store.ids()):
        _, start, end = store.caption_times(video)
        # A caption of no length overlaps nothing.
        long, texts = np.flatnonzero(end > start), store.caption_texts(video)
        if len(long):
            times = start[long].astype(float), end[long].astype(float)
            found[name] = *times, [texts[i] for i in long]
    if not found:
        raise SystemExit(
            f"--moments {store.path}: no captions in it to look for; give --annotations JSON"
        )
    return found


def _reached(overlaps: np.ndarray) -> np.ndarray:
    """(windows, sentences, 4): the overlap, and whether it reaches each of OVERLAPS."""
    return np.stack([overlaps, *(overlaps >= t for t in OVERLAPS)], axis=-1)


def _hits(scores: torch.Tensor, reached: np.ndarray) -> np.ndarray:
    """(sentences, 4): what the window that scores best has reached; windows that tie share, so that
    a model that tells none apart is as good as chance."""
    best = (scores == scores.amax(dim=1, keepdim=True)).numpy()
    best = best & np.isfinite(scores.amax(dim=1).numpy())[:, None]  # nothing to compare: a miss
    return np.einsum("wsk,sw->sk", reached, best) / np.maximum(best.sum(1), 1)[:, None]


def evaluate(
    embedder,
    store: Store,
    sentences: Sentences,
    wanted: Sequence[tuple[str, str]],
    kind: str = "cosine",
    lengths: Sequence[float] = LENGTHS,
    stride: float = STRIDE,
) -> dict:
    """R@1 of each (direction, fusion) ("text->video+audio", "sum") at each of OVERLAPS.

    For each sentence, the windows of its video are ranked by similarity; the first is right if its
    intersection over union with the annotated segment reaches the overlap. Fusions with words rank
    them by BM25 of the sentence and the words spoken there (a window is a document, the video's
    windows the collection), or by both; for words alone ``embedder`` may be None. Returns {"n"
    sentences, "videos", "missing_videos" (annotated, not in the store; left out), "unknown"
    (sentences without a known word: misses), "windows" per video, direction: {"R@1 IoU 0.3",
    "R@1 IoU 0.3_ci95", ..., "mIoU"}, also of differences, "chance", "ceiling"}, percent.
    Intervals resample videos, as sentences of one video are not independent. ``ceiling``: of a
    ranking without error; what the windows' lengths and stride allow.
    """
    number = {name: i for i, name in enumerate(store.ids())}
    there = [name for name in sentences if name in number and sentences[name][2]]
    if not there:
        raise SystemExit(
            f"{store.path}: none of the {len(sentences)} annotated videos is in it "
            f"(ids like {next(iter(sentences))}; the store's like "
            f"{next(iter(number))})"
        )
    hits = {name: [] for name in [*(label(*row) for row in wanted), "chance", "ceiling"]}
    n_windows = unknown = 0
    for name in tqdm(there, desc="moments", unit="video", mininterval=0.5):
        start, end, texts = sentences[name]
        candidates = windows(store.seconds(number[name]), lengths, stride)
        n_windows += len(candidates)
        reached = _reached(overlap(candidates, np.stack([start, end], axis=1)))
        if embedder:
            # All windows of a video once, for all its sentences and directions.
            clips = embedder.stretches(store, number[name], candidates[:, 0], candidates[:, 1])
            asked = embedder.texts(texts)
            unknown += int((~asked[1]["text"]).sum())
        if any("words" in fusion for _, fusion in wanted):
            said = bm25(spoken(store, number[name], *candidates.T), texts)
            by_words = torch.from_numpy(said)
        for direction, fusion in wanted:
            if fusion == "words":
                scores = by_words
            else:
                scores = similarity(asked, clips, direction, kind)
                check_finite(scores)
                names = direction.split("->")[1].split("+")
                usable = torch.stack([clips[1][m] for m in names]).any(0)
                usable = asked[1]["text"][:, None] & usable
                # -inf, since 0 would rank above a negative cosine.
                scores = scores.masked_fill(~usable, -torch.inf)
            if fusion.startswith(WORDS):
                scores = reciprocal_ranks(scores) + reciprocal_ranks(by_words)
            hits[label(direction, fusion)].append(_hits(scores, reached))
        hits["chance"].append(reached.mean(axis=0))
        # The best window of each sentence, as if the ranking were perfect.
        hits["ceiling"].append(reached.max(axis=0))
    for direction, fusion in wanted:
        if fusion.startswith(WORDS):
            both, one = label(direction, fusion), label(direction, fusion.removeprefix(WORDS))
            pairs = zip(hits[both], hits[one], strict=True)
            hits[f"{both} less {one}"] = [a - b for a, b in pairs]
    result = {
        "n": sum(map(len, hits["chance"])),
        "videos": len(there),
        "missing_videos": len(sentences) - len(there),
        "unknown": unknown,
        "windows": round(n_windows / len(there), 1),
        "lengths": list(map(float, lengths)),
        "stride": stride,
    }
    return result | {name: _summary(values) for name, values in hits.items()}


def _summary(values: list[np.ndarray]) -> dict:
    """Means over sentences in percent, 95 % intervals from resampled videos, if there are some."""
    counts, sums = np.array([len(v) for v in values]), np.array([v.sum(axis=0) for v in values])
    out = {}
    for name, of in zip(["mIoU", *RECALLS], sums.T, strict=True):
        out[name] = round(float(100 * of.sum() / counts.sum()), 3)
        if len(values) > 1:
            # The same seed for all: directions are compared on the same resampled videos.
            draws = 100 * resample(of, counts, np.random.default_rng(0))
            out[f"{name}_ci95"] = np.percentile(draws, [2.5, 97.5]).round(3).tolist()
    return out


def table_rows(result: dict) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of :func:`evaluate`'s result."""
    body = []
    for name, row in result.items():
        if isinstance(row, dict):
            cells = [name]
            for key in RECALLS:
                interval = row.get(f"{key}_ci95")
                cells.append(
                    f"{row[key]:.1f}"
                    + (" ({:.1f} to {:.1f})".format(*interval) if interval else "")
                )
            body.append([*cells, f"{row['mIoU']:.1f}"])
    return [f"moments (n = {result['n']} in {result['videos']} videos)", *RECALLS, "mIoU"], body


def notice(result: dict) -> str:
    """What the table leaves out or counts as missed, in words; empty if nothing."""
    parts, missing = [], result["missing_videos"]
    if missing:
        n = result["videos"] + missing
        parts.append(f"{missing} of {n} annotated videos are not in the store: left out")
    if result["unknown"]:
        parts.append(f"{result['unknown']} sentences without a known word: misses")
    return "; ".join(parts)
