"""Tokeniser and word vectors. Text is a bag of word vectors; unknown words are dropped."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import re
import unicodedata
from collections.abc import Iterable, Set
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mcn_ext.data.files import replace
from mcn_ext.data.word2vec import read, read_npz

MAX_SENTENCES = 500_000
MAX_COUNTED = 200_000  # captions; on a store of 136 million, a sample tells as much
LOG = logging.getLogger("mcn")
_WORD = re.compile(r"[\w']+")
# Typographic apostrophes are plain ones; soft hyphens and variants of signs are not seen.
_SIGNS = str.maketrans("\u2019\u02bc", "''", "\u00ad\ufe0e\ufe0f")
_JOINERS = "\u200c\u200d"  # stand within words of Persian and Hindi
# One sign of a script without spaces (Thai and Lao, Burmese, Khmer, kana, Han), or others in a row.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"
UNIT = re.compile(f"[{_UNSPACED}]|[^{_UNSPACED}]+")
_LONGEST = 10  # units of a word that is looked for within another


def _is_in_word(sign: str) -> bool:
    # M: combining marks, such as vowels of Hindi, which \w does not match.
    return sign.isalnum() or sign in "_'" + _JOINERS or unicodedata.category(sign)[0] == "M"


def tokenize(text: str) -> list[str]:
    """Words of a caption, case kept, as the published code splits them; beyond ASCII, they are not
    cut at combining marks, and have composed accents (NFC)."""
    if text.isascii():  # quicker, and the same
        return _WORD.findall(text)
    text = unicodedata.normalize("NFC", text.translate(_SIGNS))
    return "".join(sign if _is_in_word(sign) else " " for sign in text).split()


def forms(word: str) -> list[str]:
    """Spellings a word is looked up under, the best first: as written, then in lower case, then,
    of a word in capitals, capitalised (PARIS: paris, Paris).

    A word in lower case is not capitalised: GoogleNews has "And" and "Of", but not "and" and "of",
    which published results leave out.
    """
    return [word, word.lower(), word.capitalize()] if word.isupper() else [word, word.lower()]


def parts(word: str) -> set[str]:
    """A word, and in scripts without spaces, where it may be a sentence, what may be words in it:
    all that :meth:`WordVectors.find` looks up."""
    units = UNIT.findall(word)
    starts, sizes = range(len(units)), range(1, _LONGEST + 1)
    return {word} | {"".join(units[at : at + size]) for at in starts for size in sizes}


class WordVectors:
    """A vocabulary and its vectors (V, dim) float32; ``source``: the file they are from;
    ``absent``: words that were looked for there, and are not in it."""

    def __init__(
        self, words: list[str], vectors: np.ndarray, source: str, absent: Iterable[str] = ()
    ):
        self.words, self.source, self.absent = words, source, set(absent)
        self.vectors = np.ascontiguousarray(vectors, np.float32)
        self.index = {word: i for i, word in enumerate(words)}

    @property
    def dim(self) -> int:
        return self.vectors.shape[1]

    def row(self, word: str) -> int | None:
        """The row of ``vectors`` of the first of a word's :func:`forms` that is there."""
        return next((self.index[form] for form in forms(word) if form in self.index), None)

    def find(self, word: str) -> list[int]:
        """The row of a word, if it is known. Of an unknown one in a script without spaces, the rows
        of the words in it: from its begin on, each time the longest known one."""
        row = self.row(word)
        if row is not None or word.isascii():
            return [] if row is None else [row]
        units, found, end = UNIT.findall(word), [], 0
        while (at := end) < len(units):
            # Without a known one, ``end`` stops at the next unit.
            for end in range(min(at + _LONGEST, len(units)), at, -1):
                if (row := self.row("".join(units[at:end]))) is not None:
                    found.append(row)
                    break
        return found

    def rows(self, text: str, max_words: int) -> np.ndarray:
        """Rows of ``vectors``, int64, of a caption's first ``max_words`` known words, if any."""
        rows = [row for word in tokenize(text) for row in self.find(word)]
        return np.array(rows[:max_words], np.int64)

    def agrees(self, other: WordVectors) -> bool:
        """Whether words in both have the same vectors."""
        common = self.index.keys() & other.index.keys()
        mine, theirs = ([w.index[word] for word in common] for w in (self, other))
        return self.dim == other.dim and np.array_equal(self.vectors[mine], other.vectors[theirs])

    def save(self, path: Path) -> None:
        """Write an .npz: vectors, and texts as UTF-8 bytes, which need no pickle."""
        texts = {
            "words": "\n".join(self.words),
            "source": self.source,
            "absent": "\n".join(sorted(self.absent)),
        }
        arrays = {name: np.frombuffer(text.encode(), np.uint8) for name, text in texts.items()}
        replace(path, lambda file: np.savez(file, vectors=self.vectors, **arrays))

    @classmethod
    def load(cls, path: Path) -> WordVectors:
        """Read what :meth:`save` wrote; damage raises one of a dozen types."""
        return cls(*read_npz(path))


class Coverage(NamedTuple):
    """How much of a store's captions word vectors know; numbers of what was looked at."""

    n_words: int  # distinct words
    n_known: int  # of these, with a vector
    n_captions: int
    n_without: int  # of these, without any known word


def coverage(store, words: WordVectors) -> Coverage:
    """What ``words`` know of the store's captions, of evenly spaced videos if it has more than
    ``MAX_COUNTED`` captions."""
    every = -(-store.n_captions // MAX_COUNTED)
    if every > 1:  # by video: only what is counted is read
        videos = range(0, len(store), every)
        texts = (text for video in videos for text in store.caption_texts(video))
    else:
        texts = store.texts()
    known: dict[str, bool] = {}
    n_captions = n_without = 0
    for text in islice(texts, MAX_COUNTED):
        found = tokenize(text)
        # Each word is looked up once, however often it occurs.
        known |= {word: bool(words.find(word)) for word in found if word not in known}
        n_captions += 1
        n_without += not any(known[word] for word in found)
    return Coverage(len(known), sum(known.values()), n_captions, n_without)


def require_gensim() -> None:
    """SystemExit if gensim, which trains word vectors, is not installed."""
    if importlib.util.find_spec("gensim") is None:
        raise SystemExit(
            "without --word2vec, word vectors are trained on the captions, which needs gensim, and "
            "it is not installed: pip install gensim, or give --word2vec FILE"
        )


def vectors_of(seen: Set[str], word2vec: Path, whose: str, source: str = "") -> WordVectors:
    """The vectors of ``word2vec`` for words, each under the best of its :func:`forms`; SystemExit
    if it has none of them, warns of some that are not finite. ``whose`` they are, for people."""
    # All forms are asked for at once: the file may be 3.6 GB, and is read once.
    looked_up = {part for word in seen for part in parts(word)}
    row_of, vectors = read(word2vec, {form for part in looked_up for form in forms(part)})
    found = (next((form for form in forms(part) if form in row_of), None) for part in looked_up)
    known = sorted({form for form in found if form is not None})
    if not known:
        raise SystemExit(
            f"--word2vec {word2vec}: none of the {len(seen)} words of {whose} is in "
            "it; is it for another language?"
        )
    rows = vectors[[row_of[word] for word in known]]
    # One NaN in the table would make every caption with that word NaN.
    finite = np.isfinite(rows).all(axis=1)
    broken = [word for word, good in zip(known, finite, strict=True) if not good]
    if broken:
        LOG.warning(
            "%s: the vectors of %d words are not finite and are left out: %s",
            word2vec,
            len(broken),
            ", ".join(broken[:10]),
        )
    words = [word for word, good in zip(known, finite, strict=True) if good]
    return WordVectors(words, rows[finite], source or str(word2vec))


def vectors_for(store, word2vec: Path, cache: Path | None, more: Iterable[str] = ()) -> WordVectors:
    """The vectors of ``word2vec`` for the words of the store's captions, and of ``more`` texts.

    GoogleNews has 3 million words in 3.6 GB; the words of a store are kept beside it in ``cache``
    and read from there by every later run and rank. Words of ``more`` join them there, or are noted
    as absent.
    """
    stat, made = word2vec.stat(), store.files[0].stat()
    # Sizes and times stand for the contents, which would take long to hash.
    facts = (word2vec.name, stat.st_size, stat.st_mtime_ns, made.st_size, made.st_mtime_ns)
    # "parts": caches of earlier versions lack the words within words.
    key = hashlib.sha256(repr((*facts, store.n_captions, "parts")).encode()).hexdigest()
    asked, seen, absent = {word for text in more for word in tokenize(text)}, None, set()
    source = f"{word2vec} #{key[:16]}"
    if cache is not None and cache.exists():
        try:
            cached = WordVectors.load(cache)
            if cached.source == source:
                if asked <= cached.index.keys() | cached.absent:
                    return cached
                # The cache holds the store's words already; only the new ones have to join them.
                seen, absent = set(cached.words), cached.absent
        except Exception as error:  # damage makes zip and numpy raise a dozen types
            LOG.warning("%s: damaged (%s), made again", cache, error)
    if seen is None:
        seen = {word for text in store.texts() for word in tokenize(text)}
    words = vectors_of(seen | asked, word2vec, f"{store.path}'s captions", source)
    words.absent = absent | asked - words.index.keys()
    if cache is not None:
        try:
            words.save(cache)
        except SystemExit:  # a read-only or full data folder: slower next time, nothing else
            LOG.warning("could not keep word vectors in %s; they are read again next time", cache)
    return words


def train_vectors(store, dim: int = 300, seed: int = 0) -> WordVectors:
    """Skip-gram vectors of the store's own captions, for when there is no word2vec file."""
    require_gensim()
    from gensim.models import Word2Vec

    # Not all 136 million captions of HowTo100M, which would take days and 100 GB.
    every = max(1, store.n_captions // MAX_SENTENCES)
    # Every n-th caption of the whole store: its beginning may be about few things.
    sentences = [tokenize(text) for text in islice(store.texts(), 0, None, every)]
    # One worker and a fixed seed: the same captions give the same vectors.
    model = Word2Vec(
        sentences,
        vector_size=dim,
        window=5,
        # A word seen once or twice is hardly learnt; of few captions all words are kept.
        min_count=3 if len(sentences) > 300 else 1,
        sg=1,
        seed=seed + 1,
        workers=1,
        epochs=5 if len(sentences) > 20_000 else 20,
    )
    words = list(model.wv.index_to_key)
    if not words:
        raise SystemExit(
            f"{store.path}: no word occurs often enough in its captions to train "
            "vectors; give --word2vec"
        )
    # Of few captions, all words' vectors point much the same way; what tells them apart is the rest
    # (Mu & Viswanath 2018).
    vectors = model.wv.vectors - model.wv.vectors.mean(axis=0)
    # The scale of GoogleNews' vectors, whose rms norm is about 2: encoders are initialised for it.
    scale = 2.0 / np.sqrt((vectors**2).sum(1).mean())
    return WordVectors(words, vectors * scale, f"trained on {store.path}")
