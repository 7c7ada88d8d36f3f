"""Retrieval in every direction: clips -> embeddings -> similarities -> ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations, product

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mcn_ext.data import ClipReader, collate, draw_spans, to_device
from mcn_ext.metrics import ranks
from mcn_ext.reference import unit_rows
from mcn_ext.store import Store

ORDER = ("video", "audio", "text")
FUSIONS = ("sum", "mean", "bank")
MAIN = ("text->video+audio", "text->video", "text->audio", "audio->video")


# ({modality: embeddings (n, D)}, {modality: which clips have it (n,) bool})
Clips = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]


def directions(modalities: Iterable[str]) -> list[str]:
    """All "queries->candidates" of disjoint sets of modalities, the customary ones first."""
    names = [name for name in ORDER if name in set(modalities)]
    sets = [chosen for n in (1, 2) for chosen in combinations(names, n)]
    found = [f"{'+'.join(queries)}->{'+'.join(candidates)}"
             for queries, candidates in product(sets, sets) if not set(queries) & set(candidates)]
    return sorted(found, key=lambda d: MAIN.index(d) if d in MAIN else len(MAIN))


@torch.inference_mode()
def embed(model, reader: ClipReader, clips: Iterable[tuple[int, list[tuple[int, int]]]],
          device: torch.device, table: Tensor | None, batch_size: int) -> Clips:
    """Clips, (video, spans) as :meth:`~mcn_ext.data.ClipReader.read` takes them -> ({modality:
    (n, D) fp32}, {modality: (n,) bool}), on the CPU."""
    clips = list(clips)
    embeddings, valid = {m: [] for m in model.modalities}, {m: [] for m in model.modalities}
    starts = range(0, len(clips), batch_size)
    for begin in tqdm(starts, desc="embed", unit="batch", mininterval=0.5):
        part = collate([reader.read(*clip) for clip in clips[begin:begin + batch_size]])
        batch = to_device(part, device, table)
        for name in model.modalities:
            embeddings[name].append(model.encode(name, batch)[1].float().cpu())
            valid[name].append(batch["valid"][name].cpu())
    return ({m: torch.cat(e) for m, e in embeddings.items()},
            {m: torch.cat(v) for m, v in valid.items()})


def some_clips(store: Store, n: int, min_time: float, seed: int = 0) -> list[tuple[int, list]]:
    """``n`` clips of a training store as (video, spans), from videos all over it."""
    videos = np.flatnonzero(store.caption_counts())
    chosen = videos[np.linspace(0, len(videos) - 1, min(n, len(videos))).astype(int)]
    rng = np.random.default_rng(seed)
    each = [n // len(chosen) + (i < n % len(chosen)) for i in range(len(chosen))]
    return [(int(v), draw_spans(*store.caption_times(v)[1:], count, min_time, rng))
            for v, count in zip(chosen, each, strict=True)]


def similarity(queries: Clips, candidates: Clips, direction: str, kind: str = "cosine",
               fusion: str = "sum") -> Tensor:
    """(queries, candidates) similarity for a direction "queries->candidates" of modalities, fp32.

    sum: over the pairs of modalities, the cosine (``kind`` "dot": the dot product), as published. A
    modality that a clip lacks adds nothing. mean: the cosine of the means of unit embeddings, which
    does not favour clips whose modalities agree: the length of a mean is divided out.
    """
    def side(clips, names):
        embeddings, valid = clips
        rows = {m: unit_rows(embeddings[m]) if kind == "cosine" or fusion == "mean"
                else embeddings[m] for m in names.split("+")}
        rows = sum(torch.where(valid[m][:, None], x, 0.0) for m, x in rows.items())
        return unit_rows(rows) if fusion == "mean" else rows

    query, candidate = direction.split("->")
    return side(queries, query) @ side(candidates, candidate).T


def rank(clips: Clips, direction: str, kind: str = "cosine", fusion: str = "sum",
         bank: Clips | None = None, temperature: float = 0.05) -> tuple[Tensor, np.ndarray]:
    """(scores (n, n), rank of each query's own clip (n,)); a clip without any of the direction's
    modalities is a miss, as a candidate and as a query.

    fusion: how modalities join, see :func:`similarity`; or "bank": their sum s, less what draws
    any query to candidate j, log sum_b exp(s_bj / T) over the clips of a ``bank`` (training clips,
    never the evaluation's; T the training's temperature). That is the log-probability of query i
    given j among the bank, which the column half of the contrastive loss trains; after QB-Norm
    (Bogolin et al., CVPR 2022).
    """
    how = "mean" if fusion == "mean" else "sum"
    scores = similarity(clips, clips, direction, kind, how)
    if fusion == "bank":
        drawn = similarity(bank, clips, direction, kind, how)
        scores = scores / temperature - (drawn / temperature).logsumexp(dim=0)
    asks, answers = (torch.stack([clips[1][m] for m in side.split("+")]).any(dim=0)
                     for side in direction.split("->"))
    # Clips with nothing to compare stand behind all others; queries without content find nothing.
    scores = torch.where(answers[None, :], scores, scores.min() - 1.0)
    rank = ranks(scores)
    rank[~(asks & answers).numpy()] = len(rank)
    return scores, rank
