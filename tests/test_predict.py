"""Which pair first, by raw features alone."""

import json

import numpy as np
import pytest

from mcn_ext.prepare import demo
from mcn_ext.study import plan
from mcn_ext.study.predict import bag_of_words, knn, orders, p_values, wrong_share

VIDEO = np.arange(600) // 6


def two_views(rng, noise=0.1, n=600):
    """Features (n, 30) of the same 5 hidden numbers."""
    hidden = rng.normal(size=(n, 5))
    return [hidden @ rng.normal(size=(5, 30)) + noise * rng.normal(size=(n, 30)) for _ in range(2)]


def test_probes_know_what_belongs_together():
    rng = np.random.default_rng(0)
    x, y = two_views(rng)
    other = rng.normal(size=(600, 900))  # more features than clips to fit on
    assert p_values(x, y, VIDEO).mean() < 0.02 and knn(x, y) > 0.3
    p = p_values(x, other, VIDEO)
    assert p.mean() == pytest.approx(0.5, abs=0.05) and wrong_share(p) > 0.85
    assert knn(x, other) == pytest.approx(10 / 599, abs=0.01)
    assert knn(x, x) == 1 and p_values(x, -x, VIDEO).mean() < 0.01
    constant = np.ones((600, 3))
    assert p_values(constant, y, VIDEO).mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5])
def test_the_share_of_wrong_pairs_is_found_within_five_points(share):
    rng = np.random.default_rng(1)
    x, y = two_views(rng, 1.0, n=1800)
    swapped = rng.choice(1800, int(1800 * share), replace=False)
    y[swapped] = y[np.roll(swapped, 1)]
    p = p_values(x, y, np.arange(1800) // 6)
    assert wrong_share(p) == pytest.approx(share, abs=0.05)
    wrong = np.isin(np.arange(1800), swapped)
    if share:  # area under the ROC curve
        assert (p[wrong][:, None] > p[~wrong]).mean() > 0.9


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
    assert "by knn: " in text and "not belong together, at most: AV " in text
    assert not (out / "study.json").exists()
    with pytest.raises(SystemExit, match="no audio stream 'beats'"):
        plan.main(["--predict", *words, str(out), "--audio", "beats"])
    monkeypatch.setattr(plan.run, "run", lambda *_: [])
    assert plan.main([*words, str(out)]) == 0
    (cell,) = json.loads((out / "study.json").read_text())["cells"]
    found = cell["probes"]
    assert list(found) == ["cca", "clean", "knn"]
    for scores in found.values():
        assert set(scores) == {"AV", "VT", "AT"} and all(0 <= s <= 1 for s in scores.values())
    assert all(value > 0.4 for value in found["cca"].values())
