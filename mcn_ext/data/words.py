"""Tokeniser and word vectors. Text is a bag of word vectors; unknown words are dropped."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import re
from collections.abc import Iterable, Set
from itertools import islice
from pathlib import Path

import numpy as np

from mcn_ext.data.files import replace
from mcn_ext.data.unpickle import load_key_vectors

MAX_SENTENCES = 500_000
_WORD = re.compile(r"[\w']+")


def tokenize(text: str) -> list[str]:
    """Words of a caption, case kept, as the published code splits them."""
    return _WORD.findall(text)


class WordVectors:
    """A vocabulary and its vectors (V, dim) float32; ``absent``: words that were asked for, too,
    and are not in ``source``."""

    def __init__(
        self, words: list[str], vectors: np.ndarray, source: str, absent: Iterable[str] = ()
    ):
        self.words, self.vectors, self.source = (
            words,
            np.ascontiguousarray(vectors, np.float32),
            source,
        )
        self.absent = set(absent)
        self.index = {word: i for i, word in enumerate(words)}

    @property
    def dim(self) -> int:
        return self.vectors.shape[1]

    def rows(self, text: str, max_words: int) -> np.ndarray:
        """Rows of ``vectors``, int64, of a caption's first ``max_words`` known words, if any."""
        found = map(self.index.get, tokenize(text))
        return np.array([row for row in found if row is not None][:max_words], np.int64)

    def agrees(self, other: WordVectors) -> bool:
        """Whether words in both have the same vectors."""
        common = self.index.keys() & other.index.keys()
        mine, theirs = ([w.index[word] for word in common] for w in (self, other))
        return self.dim == other.dim and np.array_equal(self.vectors[mine], other.vectors[theirs])

    def save(self, path: Path) -> None:
        texts = {
            "words": "\n".join(self.words),
            "source": self.source,
            "absent": "\n".join(sorted(self.absent)),
        }
        replace(
            path,
            lambda file: np.savez(
                file,
                vectors=self.vectors,
                **{name: np.frombuffer(text.encode(), np.uint8) for name, text in texts.items()},
            ),
        )

    @classmethod
    def load(cls, path: Path) -> WordVectors:
        with np.load(path, allow_pickle=False) as file:
            words, vectors = file["words"].tobytes().decode().split("\n"), file["vectors"]
            if vectors.ndim != 2 or len(words) != len(vectors):
                raise ValueError(f"{path}: {len(words)} words, vectors of shape {vectors.shape}")
            absent = file["absent"].tobytes().decode() if "absent" in file else ""
            return cls(words, vectors, file["source"].tobytes().decode(), absent.split())


def require_gensim(word2vec: Path | None) -> None:
    """SystemExit if gensim is not installed and needed: for all of --word2vec but .npz and .kv, and
    to train vectors where it is not given."""
    if word2vec is not None and word2vec.suffix in (".npz", ".kv"):
        return
    if importlib.util.find_spec("gensim") is None:
        what = (
            "without --word2vec, word vectors are trained on the captions, which"
            if word2vec is None
            else f"--word2vec {word2vec}: a file that is not .npz or .kv"
        )
        raise SystemExit(
            f"{what} needs gensim, and it is not installed: pip install gensim, or "
            "give --word2vec FILE.npz (words.npz of another run), which does not "
            "need it"
        )


def _read(path: Path) -> tuple[dict[str, int], np.ndarray]:
    """({word: row}, vectors) of a file: .npz of :meth:`WordVectors.save`, gensim .kv, text (.txt,
    .vec), else word2vec binary."""
    require_gensim(path)
    try:
        if path.suffix == ".npz":
            words = WordVectors.load(path)
            if not words.dim:
                raise ValueError("its vectors have no numbers")
            return words.index, words.vectors
        if path.suffix == ".kv":  # gensim reads its own format with pickle, which may run code
            names, vectors = load_key_vectors(path)
            return {word: i for i, word in enumerate(names)}, vectors
        from gensim.models import KeyedVectors

        keyed = KeyedVectors.load_word2vec_format(
            str(path), binary=path.suffix not in (".txt", ".vec"), unicode_errors="replace"
        )
        if not keyed.vector_size:
            raise ValueError("its vectors have no numbers")
        return keyed.key_to_index, keyed.vectors
    except (FileNotFoundError, ImportError):  # a gensim that is broken is not the file's fault
        raise
    except Exception as error:  # gensim checks little: damage surfaces as a dozen types
        raise SystemExit(
            f"--word2vec {path}: not a word2vec file ({error}); give a .bin, a gensim .kv, a text "
            "file ending in .txt or .vec, or a run's words.npz"
        ) from error


def vectors_of(seen: Set[str], word2vec: Path, whose: str, source: str = "") -> WordVectors:
    """The vectors of ``word2vec`` for words; SystemExit if it has none of them, warns of some that
    are not finite. ``whose`` they are, for people."""
    row_of, vectors = _read(word2vec)
    known = sorted(seen & row_of.keys())
    if not known:
        raise SystemExit(
            f"--word2vec {word2vec}: none of the {len(seen)} words of {whose} is in "
            "it; is it for another language?"
        )
    rows = vectors[[row_of[word] for word in known]]
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        broken = [word for word, good in zip(known, finite, strict=True) if not good]
        logging.getLogger("mcn").warning(
            "%s: the vectors of %d words are not finite and are left out: %s",
            word2vec,
            len(broken),
            ", ".join(broken[:10]),
        )
    return WordVectors(
        [w for w, good in zip(known, finite, strict=True) if good],
        rows[finite],
        source or str(word2vec),
    )


def is_kept(word2vec: Path, cache: Path) -> bool:
    """Whether ``cache`` has vectors of ``word2vec``, kept by :func:`vectors_for`."""
    try:
        return WordVectors.load(cache).source.startswith(f"{word2vec} #")
    except Exception:  # not there, or damaged: a dozen types
        return False


def vectors_for(store, word2vec: Path, cache: Path | None, more: Iterable[str] = ()) -> WordVectors:
    """The vectors of ``word2vec`` for the words of the store's captions, and of ``more`` texts.

    GoogleNews has 3 million words and takes a minute and 3.6 GB to read; the words of a store are
    kept beside it in ``cache`` and read from there by every later run and rank. Words of ``more``
    join them there, or are noted as absent.
    """
    stat, made = word2vec.stat(), store.files[0].stat()
    facts = (word2vec.name, stat.st_size, stat.st_mtime_ns, made.st_size, made.st_mtime_ns)
    key = hashlib.sha256(repr((*facts, store.n_captions)).encode()).hexdigest()
    asked, seen, absent = {word for text in more for word in tokenize(text)}, None, set()
    source = f"{word2vec} #{key[:16]}"
    if cache is not None and cache.exists():
        try:
            cached = WordVectors.load(cache)
            if cached.source == source:
                if asked <= cached.index.keys() | cached.absent:
                    return cached
                seen, absent = set(cached.words), cached.absent
        except Exception as error:  # damage makes zip and numpy raise a dozen types
            logging.getLogger("mcn").warning("%s: damaged (%s), made again", cache, error)
    if seen is None:
        seen = {word for text in store.texts() for word in tokenize(text)}
    words = vectors_of(seen | asked, word2vec, f"{store.path}'s captions", source)
    words.absent = absent | asked - words.index.keys()
    if cache is not None:
        try:
            words.save(cache)
        except SystemExit:  # a read-only or full data folder: slower next time, nothing else
            logging.getLogger("mcn").warning(
                "could not keep word vectors in %s; they are read again next time", cache
            )
    return words


def train_vectors(store, dim: int = 300, seed: int = 0) -> WordVectors:
    """Skip-gram vectors of the store's own captions, for when there is no word2vec file."""
    require_gensim(None)
    from gensim.models import Word2Vec

    # Enough for good vectors; all 136 million captions of HowTo100M would take days and 100 GB.
    every = max(1, store.n_captions // MAX_SENTENCES)
    sentences = [tokenize(text) for text in islice(store.texts(), 0, None, every)]
    # One worker and a fixed seed: the same captions give the same vectors.
    model = Word2Vec(
        sentences,
        vector_size=dim,
        window=5,
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
    return WordVectors(
        words, vectors * (2.0 / np.sqrt((vectors**2).sum(1).mean())), f"trained on {store.path}"
    )
