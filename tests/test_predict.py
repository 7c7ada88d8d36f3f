"""Which pair first, by raw features alone."""

import json

import numpy as np
import pytest

from mcn_ext.prepare import demo
from mcn_ext.study import plan
from mcn_ext.study.predict import bag_of_words, cca, knn, orders


def test_probes_know_what_belongs_together():
    rng = np.random.default_rng(0)
    fit = np.arange(400) % 2 == 0
    shared = rng.normal(size=(400, 5))
    x, y = (shared @ rng.normal(size=(5, 30)) + 0.1 * rng.normal(size=(400, 30)) for _ in range(2))
    other = rng.normal(size=(400, 200))  # more features than clips to fit on
    assert cca(x, y, fit) > 0.97 and knn(x, y) > 0.3
    assert cca(x, other, fit) == pytest.approx(0.5, abs=0.08)
    assert knn(x, other) == pytest.approx(10 / 399, abs=0.01)
    assert knn(x, x) == 1 and cca(x, -x, fit) > 0.99
    swapped = y.copy()
    swapped[::2] = y[::2][::-1]  # half of the pairs are wrong
    assert 0.6 < cca(x, swapped, np.arange(400) < 200) < cca(x, y, fit) - 0.1
    constant = np.ones((400, 3))
    assert cca(constant, y, fit) == pytest.approx(0.5, abs=0.05) and 0 <= knn(constant, y) <= 1


def test_bag_of_words():
    rows, known = bag_of_words(["Fry the onion", "fry fish", "the end", "", "unique"])
    assert rows.shape == (5, 2) and known.tolist() == [True, True, True, False, False]
    assert sorted(rows[0]) == pytest.approx([np.log(5 / 2)] * 2)
    assert orders({"AV": 0.1, "VT": 0.3, "AT": 0.2}) == ["VT_A", "AT_V", "AV_T"]


def test_a_study_notes_the_prediction_before_it_trains(tmp_path, monkeypatch, capsys):
    demo.prepare(tmp_path, videos=32, shift=0.5)
    words = f"--data {tmp_path}/train.h5 --youcook2 {tmp_path}/eval.h5 --preset demo --out".split()
    out = tmp_path / "study"
    assert plan.main(["--predict", *words, str(out)]) == 0
    text = capsys.readouterr().out
    assert "by knn: " in text and "by cca: " in text and not (out / "study.json").exists()
    monkeypatch.setattr(plan.run, "run", lambda *_: [])
    assert plan.main([*words, str(out)]) == 0
    (cell,) = json.loads((out / "study.json").read_text())["cells"]
    found = cell["probes"]
    assert set(found["cca"]) == set(found["knn"]) == {"AV", "VT", "AT"}
    assert all(0.4 < value <= 1 for value in found["cca"].values())
    assert all(0 <= value <= 1 for value in found["knn"].values())
