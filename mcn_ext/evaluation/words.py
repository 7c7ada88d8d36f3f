"""Clips found by the words spoken in them: BM25, and its fusion with other scores by ranks."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from mcn_ext.data.words import UNIT, tokenize


@functools.lru_cache(2**20)
def _stem(word: str) -> str:
    import snowballstemmer  # here: whoever does not search by words can do without

    return snowballstemmer.stemmer("english").stemWord(word)


def terms(text: str) -> list[str]:
    """What is counted of a text: stems of its words (Snowball's English), and of scripts without
    spaces every two signs in a row, since nothing tells where a word ends."""
    found = []
    for word in tokenize(text.lower()):
        signs = UNIT.findall(word)
        found += [_stem(word)] if len(signs) == 1 else map("".join, pairwise(signs))
    return found


class BM25:
    """Okapi BM25 (Robertson et al., TREC-3, 1994) of texts, with an inverse document frequency
    that is never negative, as in Lucene. Of a query q and a document d of length |d|::

        sum over t in q of log(1 + (N - n_t + 0.5) / (n_t + 0.5))
                           * f_td (k1 + 1) / (f_td + k1 (1 - b + b |d| / mean |d|))

    f_td: how often t is in d; n_t: how many of the N documents have it. A term that is twice in q
    counts twice.
    """

    def __init__(self, documents: Sequence[str], k1: float = 1.2, b: float = 0.75):
        counts = [Counter(terms(text)) for text in documents]
        self.n = len(counts)
        self.numbers: dict[str, int] = {}
        term = [self.numbers.setdefault(t, len(self.numbers)) for c in counts for t in c]
        term, times = np.array(term, np.int64), np.array([f for c in counts for f in c.values()])
        document = np.repeat(np.arange(self.n), [len(c) for c in counts])
        length = np.bincount(document, times, self.n)
        n_with = np.bincount(term)
        rarity = np.log1p((self.n - n_with + 0.5) / (n_with + 0.5))
        norm = k1 * (1 - b + b * length / max(length.mean(), 1e-9)) if self.n else length
        weight = rarity[term] * times * (k1 + 1) / (times + norm[document])
        # Postings: the documents of a term, and its weights there, lie in a row.
        order, self.first = np.argsort(term, kind="stable"), np.append(0, np.cumsum(n_with))
        self.documents, self.weights = document[order], weight[order]

    def scores(self, queries: Sequence[str]) -> np.ndarray:
        """(queries, documents) float32, 0 where they share no term."""
        found = np.zeros((len(queries), self.n), np.float32)
        for row, query in zip(found, queries, strict=True):
            for term, times in Counter(terms(query)).items():
                if (number := self.numbers.get(term)) is not None:
                    part = slice(*self.first[number : number + 2])
                    row[self.documents[part]] += times * self.weights[part]
        return found


def bm25(
    documents: Sequence[str], queries: Sequence[str], k1: float = 1.2, b: float = 0.75
) -> np.ndarray:
    """(queries, documents) float32 scores, see :class:`BM25`."""
    return BM25(documents, k1, b).scores(queries)


def reciprocal_ranks(scores: Tensor, k: float = 60.0) -> Tensor:
    """1 / (k + rank) of each of a row's scores (queries, n), those that tie at their mean rank.
    Summed over several kinds of scores, reciprocal rank fusion (Cormack et al., SIGIR 2009)."""
    ordered = scores.sort(dim=1).values
    # Of n in a row, n - above are better, above - below tie.
    below = torch.searchsorted(ordered, scores)
    above = torch.searchsorted(ordered, scores, right=True)
    rank = scores.shape[1] + 0.5 - (below + above) / 2
    return 1 / (k + rank)


def spoken(store, video: int, begin, stop) -> list[str]:
    """The words spoken in stretches (n,) s of a video: its captions that overlap them."""
    _, start, end = store.caption_times(video)
    texts = store.caption_texts(video)
    return [
        " ".join(texts[k] for k in np.flatnonzero((start < b) & (end > a)))
        for a, b in zip(begin, stop, strict=True)
    ]
