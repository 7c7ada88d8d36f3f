"""Retrieval in every direction: clips -> embeddings -> similarities -> ranks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations, product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mcn_ext.data.clips import draw_spans
from mcn_ext.data.store import Store, StoreError
from mcn_ext.evaluation.gallery import TOP
from mcn_ext.evaluation.metrics import check_finite, ranks
from mcn_ext.evaluation.words import BM25, reciprocal_ranks
from mcn_ext.modalities import BY_NAME
from mcn_ext.reference import unit_rows

MAIN = ("text->video+audio", "text->video", "text->audio", "audio->video")
BLOCK = 2**26  # bytes of scores at a time
SHOWN = 60  # queries in a picture
WORDS = "words+"  # of a fusion: joined with the words spoken
# YouTube's ids are 64 bits, written as 11 characters of 6: the last one is one of 16.
_YOUTUBE = re.compile(r"([\w-]{10}[AEIMQUYcgkosw048])([_.-]\d+)*(#\d+)?", re.ASCII)

# ({modality: embeddings (n, D)}, {modality: which clips have it (n,) bool})
Clips = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]


def asked(
    modalities: Iterable[str], fusions: Iterable[str] = ("sum",), all_directions: bool = False
) -> list[tuple[str, str]]:
    """(direction, fusion) of what to evaluate: "queries->candidates" of disjoint sets of one or two
    modalities, the customary ones first, or alone; "mean" and "volume" only of two candidates, as
    with one they rank as the cosine. "words+sum", and so on, is for queries of text alone, and
    brings along what it joins: "words" (direction "text->words") and "sum"."""
    names = [name for name in BY_NAME if name in set(modalities)]
    sets = [chosen for n in (1, 2) for chosen in combinations(names, n)]
    every = [
        f"{'+'.join(queries)}->{'+'.join(candidates)}"
        for queries, candidates in product(sets, sets)
        if not set(queries) & set(candidates)
    ]
    customary = [d for d in every if d in MAIN or d.startswith("text->")]
    directions = every if all_directions else customary or every
    directions = sorted(directions, key=lambda d: MAIN.index(d) if d in MAIN else len(MAIN))
    joined = [part for fusion in fusions for part in (fusion.removeprefix(WORDS), fusion)]
    wanted = []
    for direction, fusion in product(directions, dict.fromkeys(joined)):
        how = fusion.removeprefix(WORDS)
        changes = how not in ("mean", "volume") or "+" in direction.split("->")[1]
        if how != "words" and changes and (how == fusion or direction.startswith("text->")):
            wanted.append((direction, fusion))
    return wanted + [("text->words", "words")] * any("words" in fusion for fusion in joined)


def label(direction: str, fusion: str) -> str:
    """What a row of results is called: the direction, and how scores were joined if not by sum."""
    return direction if fusion in ("sum", "words") else f"{direction} ({fusion})"


def some_clips(store: Store, n: int, min_time: float, seed: int = 0) -> list[tuple[int, list]]:
    """``n`` clips of a training store as (video, spans), from videos all over it."""
    videos = np.flatnonzero(store.caption_counts())
    # Evenly spaced: the order of a store may follow its topics.
    chosen = videos[np.linspace(0, len(videos) - 1, min(n, len(videos))).astype(int)]
    rng, counts = np.random.default_rng(seed), np.bincount(np.arange(n) % len(chosen))
    return [
        (int(v), draw_spans(*store.caption_times(v)[1:], count, min_time, rng))
        for v, count in zip(chosen, counts, strict=True)
    ]


def make_bank(embedder, trained: dict, n: int) -> Clips:
    """``n`` embedded clips of a run's training store, for the fusion "bank"."""
    try:
        store = Store(Path(trained["data"]))
    except StoreError as error:
        raise SystemExit(f"--fusion bank needs the training store: {error}") from None
    embedder.check(store, "--fusion bank")
    clips = some_clips(store, n, trained["min_time"])
    return embedder.clips(store, clips, trained["audio_frames"])


def check_captions(store: Store, flag: str) -> None:
    """SystemExit unless each of the store's clips has one caption, its query."""
    wrong = store.caption_counts() != 1
    if wrong.any():
        raise SystemExit(
            f"{flag} {store.path}: {wrong.sum()} of {len(store)} clips have not one caption "
            f"each, first {store.ids()[wrong.argmax()]} (is it a training store?)"
        )


def arrays(clips: Clips, ranks: Mapping[str, np.ndarray], half: bool) -> dict[str, np.ndarray]:
    """Embeddings, which are valid, and ranks by direction, for np.savez. ``half``: fp16, which
    embeddings that are not of unit length may exceed."""
    kept = {f"embedding:{m}": (x.half() if half else x).numpy() for m, x in clips[0].items()}
    kept |= {f"valid:{m}": valid.numpy() for m, valid in clips[1].items()}
    return kept | {f"rank:{direction}": rank for direction, rank in ranks.items()}


def _side(clips: Clips, names: str, kind: str, fusion: str) -> Tensor:
    """Rows whose dot products with the other side's are the similarities."""
    embeddings, valid = clips
    # sum over (a, b) of q_a . c_b = (sum of q_a) . (sum of c_b): one product serves all pairs.
    rows = 0
    for m in names.split("+"):
        x = embeddings[m]
        x = unit_rows(x) if kind == "cosine" or fusion == "mean" else x
        # A modality without content adds nothing; its embedding is not zero by itself.
        rows = torch.where(valid[m][:, None], x, 0.0) + rows
    return unit_rows(rows) if fusion == "mean" else rows


def similarity(
    queries: Clips, candidates: Clips, direction: str, kind: str = "cosine", fusion: str = "sum"
) -> Tensor:
    """(queries, candidates) similarity for a direction "queries->candidates" of modalities, fp32.

    sum: over the pairs of modalities, the cosine (``kind`` "dot": the dot product), as published. A
    modality that a clip lacks adds nothing. mean: the cosine of the means of unit embeddings, which
    does not favour clips whose modalities agree: the length of a mean is divided out.
    """
    query, candidate = direction.split("->")
    return _side(queries, query, kind, fusion) @ _side(candidates, candidate, kind, fusion).T


def _volume(queries: Tensor, video: Tensor, audio: Tensor) -> Tensor:
    """:func:`mcn_ext.reference.volume` of unit rows, in closed form: the determinant of

        [[1, a, b], [a, 1, c], [b, c, 1]]    with the cosines a, b of the query, c of the two

    A modality that is not there is a zero row: the area of the others is left.
    """
    a, b, c = queries @ video.T, queries @ audio.T, (video * audio).sum(dim=1)
    # Rounding can make it negative, and its root NaN.
    return (1 - a * a - b * b - c * c + 2 * a * b * c).clamp_min(0).sqrt()


class Ranking:
    """Ranks by the scores of all clips against all, a block of queries at a time.

    ``asks``, ``answers`` (n,) bool: clips that can be a query, or found.
    """

    asks: Tensor
    answers: Tensor

    def scores(self, queries: slice) -> Tensor:
        """Queries against every candidate, (queries, n) fp32; -inf: nothing to compare."""
        raise NotImplementedError

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """(queries, block) of all."""
        n, step = len(self.asks), _rows(len(self.asks))
        for lo in range(0, n, step):
            queries = slice(lo, min(lo + step, n))
            yield queries, self.scores(queries)

    def ranks(self, absent: int = 0) -> np.ndarray:
        """Rank of each query's own clip, (n + absent,); one that cannot ask or be found, or is one
        of ``absent`` clips of the set of which nothing is known, is a miss: it ranks last."""
        own = torch.arange(len(self.asks))
        # Checked above: -inf is not finite, and means "not there".
        found = [ranks(block, own[queries], finite=False) for queries, block in self.blocks()]
        last = float(len(own) + absent)
        rank = np.where(self.asks & self.answers, np.concatenate(found), last)
        return np.append(rank, np.full(absent, last))

    def best(self, k: int) -> np.ndarray:
        """Numbers of the ``k`` best clips for each query, (n, k); -1 where there are no more."""
        out = np.full((len(self.asks), k), -1)
        for queries, block in self.blocks():
            scores, found = block.topk(min(k, block.shape[1]), dim=1)
            usable = (scores > -torch.inf) & self.asks[queries, None]
            out[queries, : found.shape[1]] = torch.where(usable, found, -1)
        return out

    def video_ranks(self, names: list[str]) -> np.ndarray:
        """Rank of each whole video (videos,), of which the clips called the same are parts.

        A query is all that is asked of a video, a candidate all its clips::

            score(u, v) = mean over clips i of u of max over clips j of v of s_ij
        """
        order = {name: k for k, name in enumerate(dict.fromkeys(names))}
        video, n = torch.tensor([order[name] for name in names]), len(order)
        total = torch.zeros(n, n)
        for queries, block in self.blocks():
            best = torch.full((len(block), n), -torch.inf)
            # Max over the clips j of each video v, for every query i.
            best.scatter_reduce_(1, video.expand(len(block), -1), block, "amax")
            asks = self.asks[queries]
            # Sum over the clips i of each video u that can ask; divided by their number below.
            total.index_add_(0, video[queries][asks], best[asks])
        n_asked = torch.bincount(video[self.asks], minlength=n)
        n_answers = torch.bincount(video[self.answers], minlength=n)
        # Not 0 / 0 for a video without a query, which the next line makes a miss.
        found = ranks(total / n_asked.clamp(min=1)[:, None], finite=False)
        return np.where((n_asked == 0) | (n_answers == 0), float(n), found)


class Scores(Ranking):
    """Similarities of embeddings.

    fusion: how modalities join, see :func:`similarity`; or "bank": their sum s, less what draws
    any query to candidate j, log sum_b exp(s_bj / T) over the clips of a ``bank`` (training clips,
    never the evaluation's; T the training's temperature). That is the log-probability of query i
    given j among the bank, which the column half of the contrastive loss trains; after QB-Norm
    (Bogolin et al., CVPR 2022). Or "volume": less the volume that the query and the candidate's two
    modalities span (GRAM, Cicchetti et al., ICLR 2025).

    With ``strict`` a clip needs all modalities of the direction to be a query, or found, else any.
    """

    def __init__(
        self,
        clips: Clips,
        direction: str,
        kind: str = "cosine",
        fusion: str = "sum",
        bank: Clips | None = None,
        temperature: float = 0.05,
        strict: bool = False,
    ):
        how = "mean" if fusion == "mean" else "sum"
        kind = "cosine" if fusion == "volume" else kind  # of unit rows, whatever the training's
        query, candidate = direction.split("->")
        self.queries = _side(clips, query, kind, how)
        self.candidates = _side(clips, candidate, kind, how)
        there = torch.all if strict else torch.any
        self.asks, self.answers = (
            there(torch.stack([clips[1][m] for m in side.split("+")]), dim=0)
            for side in (query, candidate)
        )
        self.spanned = fusion == "volume" and [
            _side(clips, name, kind, how) for name in candidate.split("+")
        ]
        self.scale, self.drawn = 1.0, None
        if fusion == "bank":
            self.scale, rows = temperature, _side(bank, query, kind, how)
            # Blocks of candidates, as bank x candidates scores may not fit into memory.
            self.drawn = torch.cat(
                [
                    (rows @ part.T / temperature).logsumexp(dim=0)
                    for part in self.candidates.split(_rows(len(rows)))
                ]
            )

    def scores(self, queries: slice) -> Tensor:
        """FloatingPointError if any is not finite: such rows must not vanish from the mean."""
        if self.spanned:
            scores = -_volume(self.queries[queries], *self.spanned)
        else:
            scores = self.queries[queries] @ self.candidates.T
        if self.drawn is not None:
            # In place: a second block would double the memory.
            scores = scores.div_(self.scale).sub_(self.drawn)
        # Before the mask, whose -inf is meant.
        check_finite(scores)
        # Clips with nothing to compare stand behind all others.
        return scores.masked_fill_(~self.answers, -torch.inf)


class WordScores(Ranking):
    """BM25 of each clip's caption and the words spoken in each clip."""

    def __init__(self, captions: list[str], speech: list[str]):
        self.captions, self.index = captions, BM25(speech)
        self.asks = torch.ones(len(captions), dtype=torch.bool)
        # A clip without a word stands with all others that share none: tied, not last.
        self.answers = self.asks

    def scores(self, queries: slice) -> Tensor:
        return torch.from_numpy(self.index.scores(self.captions[queries]))


class RankFusion(Ranking):
    """Several rankings as one, see :func:`.words.reciprocal_ranks`."""

    def __init__(self, *parts: Ranking):
        self.parts = parts
        self.asks, self.answers = (
            torch.stack([getattr(part, name) for part in parts]).any(0)
            for name in ("asks", "answers")
        )

    def scores(self, queries: slice) -> Tensor:
        # Of a query that cannot ask, every candidate would tie at -inf, or be noise.
        return sum(
            reciprocal_ranks(part.scores(queries)) * part.asks[queries, None] for part in self.parts
        )


def _rows(columns: int) -> int:
    return max(1, BLOCK // (4 * max(columns, 1)))


def videos_of(ids: list[str]) -> list[str]:
    """The video that each clip is of. Where all ids are YouTube's, or begin with one before numbers
    of the clip, its 11 characters; else an id up to the "#2" by which ``prepare`` tells equal ones
    apart. SystemExit where clips do not share videos."""
    found, whole = [_YOUTUBE.fullmatch(name) for name in ids], set(ids)
    if all(found):
        names = [match[1] for match in found]
    else:
        # A base counts only if a clip has it as its id: an id may end in # and digits by itself.
        bases = [re.sub(r"#\d+$", "", name) for name in ids]
        names = [base if base in whole else name for base, name in zip(bases, ids, strict=True)]
    if len(set(names)) in (1, len(names)):
        raise SystemExit(
            f"--whole_videos: {len(ids)} clips of {len(set(names))} videos, by ids "
            f"such as {ids[0]}; expected several videos of several clips, with ids "
            "like GLd3aX16zBg, GLd3aX16zBg#2 or GLd3aX16zBg_2"
        )
    return names


def evaluate(
    clips: Clips,
    wanted: Iterable[tuple[str, str]],
    *,
    absent: int = 0,
    videos: list[str] | None = None,
    words: WordScores | None = None,
    best: dict[str, np.ndarray] | None = None,
    **settings,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], Tensor]:
    """Ranks (n,) of each (direction, fusion) ``wanted``, by name; those of the whole ``videos``, of
    which each clip is a part; and the first direction's corner of scores, for a picture.

    ``words``: for the fusions with words. ``best``: receives :meth:`Ranking.best`, by name.
    ``settings``: of :class:`Scores`. ``absent``: of :meth:`Ranking.ranks`.
    """
    found, of_videos, corner = {}, {}, None
    for direction, fusion in wanted:
        name = label(direction, fusion)
        scores, how = words, fusion.removeprefix(WORDS)
        if how != "words":
            scores = Scores(clips, direction, fusion=how, **settings)
        if how != fusion:
            scores = RankFusion(words, scores)
        if corner is None:
            # A corner alone: the whole matrix may not fit into memory.
            corner = scores.scores(slice(SHOWN))[:, :SHOWN]
        found[name] = scores.ranks(absent)
        if best is not None:
            best[name] = scores.best(TOP)
        if videos:
            of_videos[name] = scores.video_ranks(videos)
    return found, of_videos, corner
