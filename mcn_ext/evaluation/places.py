"""Windows of a store's videos: embedded once, then compared with sentences.

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
from mcn_ext.evaluation.words import spoken
from mcn_ext.reference import unit_rows
from mcn_ext.train.log import replace

BLOCK = 2**14  # windows that are in fp32 at once


def embed(embedder, store: Store, length: float, stride: float) -> dict[str, np.ndarray]:
    """Embed windows of ``length`` s, one every ``stride`` of it, of all videos of a store."""
    parts = []
    for video in tqdm(range(len(store)), desc="embed", unit="video", mininterval=0.5):
        begin, stop = windows(store.seconds(video), [length], stride).T
        embeddings, valid = embedder.stretches(store, video, begin, stop)
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


def score(places: dict[str, np.ndarray], sentence: Clips, kind: str) -> dict[str, np.ndarray]:
    """{"total", and each modality's part of it: (n,)} similarity with one embedded sentence."""
    parts = {}
    for m in modalities(places):
        rows, valid = (torch.from_numpy(places[f"{what}:{m}"]) for what in ("embedding", "valid"))
        blocks = zip(rows.split(BLOCK), valid.split(BLOCK), strict=True)
        parts[m] = torch.cat(
            [similarity(sentence, ({m: x.float()}, {m: v}), f"text->{m}", kind) for x, v in blocks],
            dim=1,
        )[0].numpy()
    return {"total": sum(parts.values()), **parts}


def best(places: dict[str, np.ndarray], total: np.ndarray, top: int) -> list[int]:
    """Numbers of the best windows; one that overlaps a better one by half or more is left out, as
    is one with nothing in it."""
    usable = np.any([places[f"valid:{m}"] for m in modalities(places)], axis=0)
    video, begin, stop = places["video"], places["begin"], places["stop"]
    chosen: list[int] = []
    for i in np.argsort(-np.where(usable, total, -np.inf), kind="stable"):
        if len(chosen) == top or not usable[i]:
            break
        shared = np.minimum(stop[i], stop[chosen]) - np.maximum(begin[i], begin[chosen])
        if not ((video[chosen] == video[i]) & (shared >= (stop[i] - begin[i]) / 2)).any():
            chosen.append(int(i))
    return chosen


def describe(
    places: dict[str, np.ndarray], store: Store, i: int, scores: dict[str, np.ndarray]
) -> dict:
    """One window for people: video, start, end, score and its parts, the words spoken there."""
    video, begin, stop = int(places["video"][i]), places["begin"][i], places["stop"][i]
    return {
        "video": store.ids()[video],
        "start": round(float(begin), 2),
        "end": round(float(stop), 2),
        "score": round(float(scores["total"][i]), 4),
        "of": {
            m: round(float(scores[m][i]), 4) if places[f"valid:{m}"][i] else None
            for m in modalities(places)
        },
        "words": spoken(store, video, [begin], [stop])[0],
    }
