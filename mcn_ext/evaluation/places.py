"""Windows of a store's videos: embedded once, then compared with sentences, as are their words.

Here ``places`` is a dict of arrays with one row a window: "video" (n,) its number in the store,
"begin" and "stop" (n,) s, and of each modality "embedding:<name>" (n, D) and "valid:<name>" (n,)
bool. Embeddings are fp16 unit rows where the run compares by cosine, else fp32 as they are.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from mcn_ext.console import printable
from mcn_ext.data.store import Store
from mcn_ext.evaluation.metrics import check_finite
from mcn_ext.evaluation.moments import windows
from mcn_ext.evaluation.retrieval import Clips, similarity
from mcn_ext.evaluation.words import BM25, reciprocal_ranks, spoken
from mcn_ext.reference import unit_rows
from mcn_ext.train.log import replace

BLOCK = 2**14  # windows that are in fp32 at once


def embed(embedder, store: Store, length: float, stride: float) -> dict[str, np.ndarray]:
    """Embed windows of ``length`` s, one every ``stride`` of it, of all videos of a store. Without
    an embedder they are only cut."""
    parts, bar = [], {"desc": "embed", "unit": "video", "mininterval": 0.5}
    for video in tqdm(range(len(store)), disable=embedder is None, **bar):
        begin, stop = windows(store.seconds(video), [length], stride).T
        embeddings, valid = embedder.stretches(store, video, begin, stop) if embedder else ({}, {})
        part = {"video": np.full(len(begin), video), "begin": begin, "stop": stop}
        for m, x in embeddings.items():
            rows = unit_rows(x).half() if embedder.args["similarity"] == "cosine" else x
            check_finite(rows)
            part |= {f"embedding:{m}": rows.numpy(), f"valid:{m}": valid[m].numpy()}
        parts.append(part)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def embed_once(path: Path, key: str, *args) -> dict[str, np.ndarray]:
    """:func:`embed`'s result, read from ``path`` where it was kept there with the same ``key``."""
    if path.exists():
        try:
            with np.load(path, allow_pickle=False) as file:
                if str(file["key"]) == key:
                    return {name: file[name] for name in file.files if name != "key"}
        except Exception as error:  # damage makes zip and numpy raise a dozen types
            print(printable(f"{path}: damaged ({error}), made again"), file=sys.stderr)
    places = embed(*args)
    try:
        replace(path, lambda file: np.savez(file, key=np.array(key), **places))
    except SystemExit as error:  # a full disk: slower next time, nothing else
        print(printable(f"{error}; the windows are embedded again next time"), file=sys.stderr)
    return places


def modalities(places: dict[str, np.ndarray]) -> list[str]:
    """Names of the modalities of the windows."""
    return [name.split(":")[1] for name in places if name.startswith("embedding:")]


def said(store: Store, places: dict[str, np.ndarray], rows=slice(None)) -> list[str]:
    """The words spoken in windows, of the whole clip where the store holds its speech."""
    video, begin, stop = (places[name][rows] for name in ("video", "begin", "stop"))
    if (speech := store.speech()) is not None:
        return [speech[v] for v in video]
    # Windows of a video lie in a row.
    parts = (np.split(x, np.flatnonzero(np.diff(video)) + 1) for x in (video, begin, stop))
    return [text for v, *times in zip(*parts, strict=True) for text in spoken(store, v[0], *times)]


def word_scores(store: Store, places: dict[str, np.ndarray], sentences: list[str]) -> np.ndarray:
    """BM25 (sentences, n) of sentences and what is said in windows, NaN where nothing is."""
    texts = said(store, places)
    return np.where([bool(text) for text in texts], BM25(texts).scores(sentences), np.nan)


def score(
    places: dict[str, np.ndarray], sentence: Clips | None, by_words: np.ndarray | None, kind: str
) -> dict[str, np.ndarray]:
    """{each modality: (n,) similarity with an embedded sentence, "words": ``by_words``}, NaN where
    a window has nothing of it, and "total", which ranks: the sum of similarities, or BM25, or of
    both the sum of reciprocal ranks; -inf where nothing is found. What is None is left out."""
    parts, totals = {}, []
    if sentence is not None:
        for m in modalities(places):
            rows, valid = (torch.from_numpy(places[f"{x}:{m}"]) for x in ("embedding", "valid"))
            blocks = [
                similarity(sentence, ({m: x.float()}, {m: v}), f"text->{m}", kind)
                for x, v in zip(rows.split(BLOCK), valid.split(BLOCK), strict=True)
            ]
            parts[m] = torch.cat(blocks, dim=1)[0].masked_fill(~valid, torch.nan).numpy()
        there = ~np.isnan(list(parts.values())).all(axis=0)
        totals.append(np.where(there, np.nansum(list(parts.values()), axis=0), -np.inf))
    if by_words is not None:
        parts["words"] = by_words
        totals.append(np.where(by_words > 0, by_words, -np.inf))
    total = totals[0]
    if totals[1:]:
        fused = reciprocal_ranks(torch.from_numpy(np.stack(totals))).sum(0).numpy()
        total = np.where(np.isfinite(totals).any(axis=0), fused, -np.inf)
    return {"total": total, **parts}


def best(places: dict[str, np.ndarray], total: np.ndarray, top: int) -> list[int]:
    """Numbers of the best windows; one that overlaps a better one by half or more is left out, as
    is one whose ``total`` is -inf."""
    video, begin, stop = places["video"], places["begin"], places["stop"]
    chosen: list[int] = []
    for i in np.argsort(-total, kind="stable"):
        if len(chosen) == top or total[i] == -np.inf:
            break
        shared = np.minimum(stop[i], stop[chosen]) - np.maximum(begin[i], begin[chosen])
        if not ((video[chosen] == video[i]) & (shared >= (stop[i] - begin[i]) / 2)).any():
            chosen.append(int(i))
    return chosen


def describe(
    places: dict[str, np.ndarray], store: Store, i: int, scores: dict[str, np.ndarray]
) -> dict:
    """One window for people: video, start, end, score and its parts, the words spoken there."""
    return {
        "video": store.ids()[places["video"][i]],
        "start": round(float(places["begin"][i]), 2),
        "end": round(float(places["stop"][i]), 2),
        "score": round(float(scores["total"][i]), 6),
        "of": {
            name: None if np.isnan(values[i]) else round(float(values[i]), 4)
            for name, values in scores.items()
            if name != "total"
        },
        "words": said(store, places, [i])[0],
    }
