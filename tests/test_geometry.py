"""Gaps between modalities, and retrieval by meaning, against what they are by definition."""

import numpy as np
import pytest
import torch

from mcn_ext.study.geometry import clusters, describe, gaps, load, ndcg, relevance, words_of


def test_gaps_by_hand():
    there = np.array([True, True, False])
    x, y = np.eye(3, 4), np.eye(3, 4)
    y[:, 3], y[2] = 0, np.nan  # not valid: in no number
    opposite = -x
    got = gaps({"video": (x, there), "audio": (y, there), "text": (opposite, there)})
    assert got["gap video, audio"] == 0 and got["matched video, audio"] == 1
    assert got["gap video, text"] == pytest.approx(2 * np.sqrt(2) / 2)
    assert got["matched audio, text"] == -1 and got["within video"] == 0
    assert gaps({"video": (x[:1], there[:1]), "text": (x[:1], there[:1])}) == {}


def test_relevance_counts_rare_words_more():
    captions = ["fry the onion", "fry the fish", "boil the onion", "Fry, the onion!", ""]
    got = relevance(words_of(captions))
    assert np.allclose(got, got.T) and got[0, 3] == pytest.approx(1)
    the, fry, onion, fish = np.log(5 / np.array([4, 3, 3, 1]))
    assert got[0, 1] == pytest.approx((the + fry) / (the + fry + onion + fish))
    assert not got[4, :4].any()


def test_clusters_against_words_by_hand():
    n, rng = 64, np.random.default_rng(0)
    captions = [f"{'abcd'[i % 4]} word" for i in range(n)]
    has, there = words_of(captions), np.ones(n, bool)
    there[5] = False
    kinds = np.eye(8)[np.arange(n) % 4]
    apart = np.roll(kinds, 4, axis=1)
    assert clusters({"video": (kinds, there), "text": (kinds, there)}, has) == pytest.approx(
        {"words": 100, "mixed": 100}
    )
    # Clusters of one modality each tell as much of the words, but mix nothing.
    got = clusters({"video": (kinds, there), "text": (apart, there)}, has)
    assert got == pytest.approx({"words": 100, "mixed": 0})
    one = {"text": (kinds[:1], there[:1]), "video": (kinds[:1], there[:1])}
    assert clusters(one, has[:1]) == {"words": 0, "mixed": pytest.approx(100)}
    random = rng.normal(size=(n, 8))
    got = clusters({"video": (random, there), "text": (random, there)}, has)
    assert abs(got["words"]) < 12 and got["mixed"] == pytest.approx(100)


def test_the_information_in_clusters_is_scikit_learns(monkeypatch):
    """Of one word a caption, it is the homogeneity of V-measure, adjusted for its chance."""
    from sklearn.metrics import homogeneity_score

    from mcn_ext.study import geometry

    rng = np.random.default_rng(1)
    words, labels = rng.integers(0, 2, 80), rng.integers(0, 5, 160)
    labels[np.tile(words, 2) == 1] = 3
    monkeypatch.setattr(geometry, "spherical_kmeans", lambda x, k: (None, torch.from_numpy(labels)))
    x, there = np.ones((80, 3)), np.ones(80, bool)
    got = clusters({"video": (x, there), "text": (x, there)}, words[:, None].astype(float))
    rng = np.random.default_rng(0)
    own, *by_chance = (
        homogeneity_score(np.tile(of, 2), labels)
        for of in (words, *(words[rng.permutation(80)] for _ in range(10)))
    )
    chance = np.mean(by_chance)
    assert got["words"] == pytest.approx(100 * (own - chance) / (1 - chance))


def test_ndcg():
    gains = np.array([[1.0, 0.5, 0.0], [0.0, 0.0, 1.0]])
    assert ndcg(gains, gains, 2) == pytest.approx([1, 1])
    worst = ndcg(-gains, gains, 2)
    assert worst[0] == pytest.approx((0 + 0.5 / np.log2(3)) / (1 + 0.5 / np.log2(3)))
    assert worst[1] == 0


def test_describe_reads_what_evaluation_keeps(tmp_path):
    from mcn_ext.prepare import demo

    demo.prepare(tmp_path, videos=1)
    n, rng = demo.N_EVAL, np.random.default_rng(0)
    text = rng.normal(size=(n, 8)).astype(np.float16)
    there = np.ones(n, bool)
    arrays = {f"embedding:{name}": text for name in ("video", "audio", "text")}
    arrays |= {f"valid:{name}": there for name in ("video", "audio", "text")}
    np.savez(tmp_path / "e.npz", **arrays)
    got = describe(tmp_path / "e.npz", str(tmp_path / "eval.h5"), {})
    assert got["matched video, audio"] == pytest.approx(1) and got["gap video, text"] == 0
    assert 50 < got["nDCG@10"] < 100  # its own clip is first, others at random
    assert -5 < got["words"] < 5 and got["mixed"] == pytest.approx(100)
    assert "nDCG@10" not in describe(tmp_path / "e.npz", "none.h5", {})
    assert load(tmp_path / "none.npz") == {}
    whole = (tmp_path / "e.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    del arrays["valid:text"]
    np.savez(tmp_path / "lacks.npz", **arrays)
    assert load(tmp_path / "cut.npz") == load(tmp_path / "lacks.npz") == {}
