"""How words are split, looked up, and counted as known."""

import numpy as np
import pytest

from mcn_ext.data import words as module
from mcn_ext.data.store import Store, StoreWriter
from mcn_ext.data.words import Coverage, WordVectors, coverage


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
