"""Reads the words that are asked for from files of word vectors, whatever their names end in.

Word2vec's binary format; texts of a word and its numbers a line, with a first line of two counts
(word2vec, fastText) or without (GloVe); both also packed by gzip, bzip2 or xz; gensim's .kv; and
the .npz of :class:`mcn_ext.data.words.WordVectors`. A file is read once, from its begin to its end,
and only what is asked for is kept: of GoogleNews' 3.6 GB some MB.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import re
import unicodedata
from collections.abc import Iterator, Set
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mcn_ext.data.unpickle import load_key_vectors

_PACKED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
_NUMBER = re.compile(rb"[-+]?(\d[\d.eE+-]*|\.\d[\deE+-]*|nan|inf)")
_MIB = 2**20


def _entries(file: BinaryIO, data: bytes, n_words: int, dim: int) -> Iterator[tuple[bytes, bytes]]:
    """(word, float32 of its vector) of a binary file, of whose entries ``data`` has been read."""
    at, size = 0, 4 * dim
    for number in range(n_words):
        start = data.find(b" ", at) + 1
        if not start or len(data) < start + size:  # the next block; a word has less than a MiB
            # What is left of this block, then the next one: an entry may lie across two.
            data, at = data[at:] + file.read(size + _MIB), 0
            start = data.find(b" ") + 1
            if not start or len(data) < start + size:
                raise ValueError(f"it ends after {number} of {n_words} words")
        # Some writers end each vector with a newline, which then stands before the next word.
        at, word = start + size, data[at : start - 1]
        yield word.lstrip(), data[start:at]


def _lines(lines: Iterator[bytes], n_words: int, dim: int) -> Iterator[tuple[bytes, bytes]]:
    """(word, digits of its vector) of a text."""
    number, digits = 0, b""
    for line in lines:
        if line.strip():
            word, _, digits = line.replace(b"\t", b" ").partition(b" ")
            yield word, digits
            number += 1
    # A download that broke off ends early, or within a line.
    if number < n_words or len(digits.split()) < dim:
        raise ValueError(f"it ends after {number} words, or within one")


def _scan(file: BinaryIO, wanted: Set[str] | None) -> tuple[list[str], np.ndarray]:
    """Words and vectors (V, dim) of a text or a binary file."""
    first = file.readline(_MIB).removeprefix(codecs.BOM_UTF8)
    if not first:
        raise ValueError("it is empty")
    counts = first.split()
    if has_counts := len(counts) == 2 and b"".join(counts).isdigit():
        n_words, dim, first = int(counts[0]), int(counts[1]), file.readline(_MIB)
    else:
        n_words, dim = 0, len(counts) - 1
    fields = first.split()
    # Both formats may begin with two counts; only a text's next line is a word and numbers.
    is_text = len(fields) > dim > 0 and _NUMBER.fullmatch(fields[-1])
    if not is_text and not has_counts:
        raise ValueError("its first line is neither two counts nor a word and its numbers")
    entries = (
        _lines(chain([first], file), n_words, dim)
        if is_text
        else _entries(file, first, n_words, dim)
    )
    found: dict[str, np.ndarray] = {}
    for word, raw in entries:
        name = unicodedata.normalize("NFC", word.decode(errors="replace"))
        # NFC can make two spellings equal: the first in the file counts.
        if (wanted is None or name in wanted) and name not in found:
            numbers = raw.split() if is_text else np.frombuffer(raw, "<f4")
            if len(numbers) > dim and not _NUMBER.fullmatch(numbers[0]):
                continue  # a word with spaces, as GloVe has some
            if len(numbers) != dim:
                raise ValueError(f"{name!r} has {len(numbers)} numbers, the first word {dim}")
            found[name] = np.array(numbers, np.float32)
    return list(found), np.array(list(found.values()), np.float32).reshape(len(found), dim)


def read_npz(path: Path) -> tuple[list[str], np.ndarray, str, list[str]]:
    """(words, vectors, source, absent) of an .npz of :class:`mcn_ext.data.words.WordVectors`, which
    keeps texts as UTF-8 bytes."""
    # allow_pickle=False: a file from elsewhere must not run code.
    with np.load(path, allow_pickle=False) as file:
        if "vectors" not in file:
            raise ValueError(f"a zip of {', '.join(file.files[:3]) or 'nothing'}: unpack it")
        vectors = file["vectors"]
        texts = {name: file[name].tobytes().decode() for name in file if name != "vectors"}
    words = texts["words"].split("\n")
    if vectors.ndim != 2 or len(words) != len(vectors):
        raise ValueError(f"{path}: {len(words)} words, vectors of shape {vectors.shape}")
    return words, vectors, texts["source"], texts.get("absent", "").split()


def read(path: Path, wanted: Set[str] | None = None) -> tuple[dict[str, int], np.ndarray]:
    """({word: row}, vectors (V, dim)) of all words, or at least of those that are ``wanted`` and
    there. SystemExit for a file that is damaged, or none of the module's first lines."""
    try:
        with open(path, "rb") as file:
            start = file.read(6)
        if start.startswith(b"PK"):
            words, vectors, *_ = read_npz(path)
        elif start.startswith(b"\x80"):  # a pickle, which may run code where gensim reads it
            words, vectors = load_key_vectors(path)
        else:
            # By the first bytes: a file's name need not say how it is packed.
            unpack = next((_PACKED[key] for key in _PACKED if start.startswith(key)), open)
            with unpack(path, "rb") as file:
                words, vectors = _scan(file, wanted)
        if not vectors.shape[1]:
            raise ValueError("its vectors have no numbers")
        return {word: row for row, word in enumerate(words)}, vectors
    except FileNotFoundError:
        raise
    except Exception as error:  # damage makes zip, gzip, numpy and pickle raise a dozen types
        reason = str(error) or type(error).__name__
        raise SystemExit(
            f"--word2vec {path}: not word vectors ({reason}); give word2vec's .bin, a text with a "
            "word and its numbers a line (GloVe, fastText's .vec; also .gz), a gensim .kv, or a "
            "run's words.npz. If it is one of these, it is damaged: get it again"
        ) from error
