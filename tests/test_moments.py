"""Windows, overlaps, moments, search: by hand, against brute force, and through the scripts."""

import json

import numpy as np
import pytest
import torch

from mcn_ext import moments, retrieval
from mcn_ext.metrics import ranks
from mcn_ext.places import Places
from mcn_ext.store import Store, StoreWriter
from tests.conftest import ROOT, SMALL, WORDS, call, run, write_store

YOUCOOK2 = ROOT.parent / "shared" / "data" / "youcook2" / "yc2_annotations_trainval.json"


def test_windows_reach_the_end_and_short_videos_are_one():
    assert moments.windows(12, [5], 0.5).tolist() == [[0, 5], [2.5, 7.5], [5, 10], [7, 12]]
    assert moments.windows(3, [5, 10], 0.5).tolist() == [[0, 3]]
    assert moments.windows(10, [10], 0.25).tolist() == [[0, 10]]
    many = moments.windows(97.3)
    assert many[:, 1].max() == 97.3 and (np.ptp(many, axis=1).round(9) <= 40).all()


def test_overlap_by_hand():
    """[0, 10] with [5, 10]: 5 of 10; [5, 15]: 5 of 15; [10, 20]: they touch; [3, 3]: an instant."""
    got = moments.overlap(np.array([[0.0, 10], [3, 3]]),
                          np.array([[5.0, 10], [5, 15], [10, 20], [3, 3]]))
    np.testing.assert_allclose(got, [[0.5, 1 / 3, 0, 0], [0, 0, 0, 0]])


def test_windows_that_tie_share_and_nothing_to_compare_is_a_miss():
    """Overlaps of three windows with two sentences; the first sentence's best two tie."""
    overlaps = np.array([[0.8, 0.1], [0.4, 0.6], [0.0, 0.9]])
    scores = torch.tensor([[1.0, 1.0, 0.0], [-torch.inf, -torch.inf, -torch.inf]])
    got = moments._hits(scores, overlaps)
    np.testing.assert_allclose(got, [[0.6, 1.0, 0.5, 0.5], [0, 0, 0, 0]])


class Geometry:
    """Answers like an Embedder: sentence k of a video points where second k of its sound does."""

    def texts(self, texts):
        rows = torch.eye(8)[[int(t) for t in texts]]
        return {"text": rows}, {"text": torch.ones(len(rows), dtype=torch.bool)}

    def stretches(self, store, video, begin, stop):
        rows = torch.stack([torch.eye(8)[int(a):int(b)].sum(0) for a, b in zip(begin, stop,
                                                                             strict=True)])
        return {"audio": rows}, {"audio": torch.ones(len(rows), dtype=torch.bool)}


def test_the_protocol_end_to_end_by_hand(tmp_path):
    """8 s, windows of 2 s every second. Sentence k asks for [k, k + 2] or, in the second video, for
    [k, k + 1]; windows [k - 1, k + 1] and [k, k + 2] hold second k alike. Overlap 1 and 1/3 in the
    first, 1/2 and 1/2 in the second; sentence 0 is only in [0, 2]."""
    writer = StoreWriter(tmp_path / "s.h5", {"mel": {"dim": 40, "rate_hz": 1.0}}, "test")
    for name in ("a", "b"):
        writer.add(name, {"mel": np.zeros((8, 40))}, [0, 3], [2, 5] if name == "a" else [1, 4],
                   ["0", "3"])
    store = Store(writer.close())
    sentences = moments.captions_of(store) | {"gone": (np.zeros(1), np.ones(1), ["1"])}
    result = moments.evaluate(Geometry(), store, sentences, ["text->audio"], lengths=[2],
                              stride=0.5)
    row = result["text->audio"]
    assert (result["n"], result["videos"], result["missing_videos"]) == (4, 2, 1)
    # a: sentence 0 overlaps 1; 3: (1/3 + 1) / 2. b: 0: 1/2; 3: (1/2 + 1/2) / 2.
    assert row["mIoU"] == pytest.approx(100 * (1 + 2 / 3 + 0.5 + 0.5) / 4, abs=1e-3)
    assert row["R@1 IoU 0.3"] == 100 and row["R@1 IoU 0.7"] == pytest.approx(100 * 1.5 / 4)
    assert result["ceiling"]["R@1 IoU 0.7"] == 50 and result["ceiling"]["R@1 IoU 0.5"] == 100
    assert result["chance"]["R@1 IoU 0.7"] == pytest.approx(100 * 2 / 4 / 7, abs=1e-3)
    assert "n = 4" in moments.table_rows(result)[0][0]


def test_the_real_annotations():
    if not YOUCOOK2.exists():
        pytest.skip("YouCook2's annotations (../shared/data/youcook2) are not beside this checkout")
    counts = {}
    for subset in ("training", "validation", "all"):
        found = moments.read_annotations(YOUCOOK2, subset)
        counts[subset] = len(found), sum(len(texts) for _, _, texts in found.values())
    assert counts == {"training": (1333, 10337), "validation": (457, 3492), "all": (1790, 13829)}


def test_annotations_that_are_none(tmp_path):
    bad = tmp_path / "bad.json"
    for text in ("[]", "{", '{"database": {"a": {"subset": "validation"}}}',
                 '{"database": {"a": {"subset": "validation", "annotations": '
                 '[{"segment": [5, 2], "sentence": "x"}]}}}', '{"database": {}}'):
        bad.write_text(text)
        with pytest.raises(SystemExit, match="--annotations"):
            moments.read_annotations(bad, "validation")


# ------------------------------------------------------------------------ ranking in blocks


@pytest.mark.parametrize("fusion", ["sum", "mean", "bank"])
def test_blocks_rank_as_one_matrix_does(fusion, monkeypatch):
    """Against a plain NumPy oracle, with repeated clips (ties), clips without sound or words."""
    torch.manual_seed(0)
    n = 53
    rows = {m: torch.randn(n, 6).round() for m in ("text", "video", "audio")}
    rows["video"][7] = rows["video"][3]
    rows["audio"][7] = rows["audio"][3]
    valid = {m: torch.rand(n) > 0.15 for m in rows}
    bank = {m: torch.randn(9, 6) for m in rows}, {m: torch.ones(9, dtype=torch.bool) for m in rows}
    monkeypatch.setattr(retrieval, "BLOCK", 4 * n * 5)  # 5 queries at a time
    for direction in ("text->video+audio", "video+audio->text", "audio->video"):
        scores = retrieval.Scores((rows, valid), direction, "cosine", fusion, bank, 0.1)
        assert len(list(scores.blocks())) == 11
        whole = np.concatenate([block.numpy() for _, block in scores.blocks()])
        query, candidate = direction.split("->")
        asks, answers = (np.any([valid[m].numpy() for m in side.split("+")], axis=0)
                         for side in (query, candidate))
        expected = np.empty(n)
        for i in range(n):
            others = [whole[i, j] for j in range(n) if j != i and answers[j]]
            expected[i] = 1 + sum(np.sign(x - whole[i, i]) / 2 + 0.5 for x in others)
        expected[~(asks & answers)] = n
        np.testing.assert_array_equal(scores.ranks(), expected)


def test_one_broken_embedding_anywhere_is_an_error(monkeypatch):
    rows = {"text": torch.randn(30, 4), "video": torch.randn(30, 4)}
    rows["video"][29] = torch.nan
    valid = {m: torch.ones(30, dtype=torch.bool) for m in rows}
    monkeypatch.setattr(retrieval, "BLOCK", 4 * 30 * 7)
    with pytest.raises(FloatingPointError, match="not finite"):
        retrieval.Scores((rows, valid), "text->video").ranks()


def test_whole_videos_against_loops():
    """Mean over a video's captions of the maximum over the other's clips; clips that are nothing
    are left out, a video of nothing is a miss."""
    torch.manual_seed(1)
    names = list("aabbbcdd")
    rows = {"text": torch.randn(8, 5), "video": torch.randn(8, 5)}
    valid = {"text": torch.tensor([1, 1, 1, 0, 1, 1, 1, 1], dtype=torch.bool),
             "video": torch.tensor([1, 1, 0, 1, 1, 0, 1, 1], dtype=torch.bool)}
    unit = {m: torch.nn.functional.normalize(x, dim=1).numpy() for m, x in rows.items()}
    total = np.full((4, 4), -np.inf)
    for u, asking in enumerate("abcd"):
        for v, asked in enumerate("abcd"):
            own = [i for i in range(8) if names[i] == asking and valid["text"][i]]
            theirs = [j for j in range(8) if names[j] == asked and valid["video"][j]]
            if theirs:
                total[u, v] = np.mean([max(unit["text"][i] @ unit["video"][j] for j in theirs)
                                       for i in own])
    expected = [1 + (row > row[k]).sum() for k, row in enumerate(total)]
    expected[2] = 4  # c has a caption, and no clip to be found
    got = retrieval.Scores((rows, valid), "text->video").video_ranks(names)
    assert got.tolist() == expected


def test_msrvtt_counts_what_is_missing_as_misses():
    eye = torch.eye(4)
    clips = ({"text": eye, "audio": eye, "video": eye},
             {"text": torch.ones(4, dtype=torch.bool), "video": torch.ones(4, dtype=torch.bool),
              "audio": torch.tensor([True, True, False, True])})
    found = retrieval.evaluate(clips, ["text", "audio", "video"], strict=True, absent=6)
    assert found.ranks["text->video+audio"].tolist() == [1, 1, 10, 1] + [10] * 6
    assert found.ranks["text->video"].tolist() == [1, 1, 1, 1] + [10] * 6
    assert ranks(torch.eye(2)).tolist() == [1, 1]


# ---------------------------------------------------------------------------------- search


def test_search_leaves_out_what_overlaps_and_what_is_empty():
    places = Places({"video": np.array([0, 0, 0, 1, 1]), "begin": np.array([0, 4, 8, 0, 8.0]),
                     "stop": np.array([10, 14, 18, 10, 18.0]),
                     "embedding:video": np.eye(5, dtype=np.float16),
                     "valid:video": np.array([1, 1, 1, 1, 0], bool)})
    total = np.array([0.9, 0.8, 0.7, 0.6, 5.0])
    # 1 overlaps 0 by 6 of 10 s; 2 by 2 of 10; 3 is another video; 4 has nothing in it.
    assert places.best(total, 5) == [0, 2, 3] and places.best(total, 1) == [0]


@pytest.mark.slow
def test_search_and_moments_on_a_trained_run(tmp_path):
    """A run that has learnt the test data's words finds them, and where in a video they are."""
    data = write_store(tmp_path / "train.h5", n_videos=24, silent_every=0)
    call("train_stage1.py", "--pair", "AVT", "--data", data, *SMALL, "--epochs", 25, "--lr", 3e-3,
         "--batch_size", 8, "--log_every", 50, cwd=tmp_path)
    videos = write_store(tmp_path / "videos.h5", n_videos=12, silent_every=0)  # the first of these
    common = ("--run", "runs/stage1-AVT", "--device", "cpu")
    done = call("evaluate.py", "--moments", videos, "--windows", 2, "--window_stride", 0.5, *common,
                cwd=tmp_path)
    got = json.loads((tmp_path / "runs/stage1-AVT/metrics.json").read_text())["moments"]
    assert got["n"] == 72 and got["videos"] == 12 and "text->video+audio" in done.stdout
    assert got["text->video+audio"]["R@1 IoU 0.5"] > 2 * got["chance"]["R@1 IoU 0.5"]
    steps = {name: {"task": str(i % 2), "seconds": 12, "steps": [t.split()[1] for t in texts],
                    "segments": [[k, 2 * k, 2 * k + 2] for k in range(6)]}
             for i, (name, (_, _, texts)) in enumerate(moments.captions_of(Store(videos)).items())}
    (tmp_path / "videos.h5.steps.json").write_text(json.dumps({"protocol": "crosstask",
                                                               "source": "test", "videos": steps}))
    done = call("evaluate.py", "--crosstask", videos, *common, cwd=tmp_path)
    got = json.loads((tmp_path / "runs/stage1-AVT/metrics.json").read_text())
    assert got["moments"]["n"] == 72 and got["crosstask"]["n"] == 72  # both are kept
    assert got["crosstask"]["recall"] > 1.3 * got["crosstask"]["chance"] and "IoD" in done.stdout
    run("-m", "mcn_ext.report", "runs/stage1-AVT", cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    page = (tmp_path / "runs/stage1-AVT/report.md").read_text()
    assert "R@1 IoU 0.5" in page and "spread evenly" in page
    search = ["-m", "mcn_ext.search", "--store", videos, *common, "--window", 2, "--json",
              "found.json"]
    env = {"PYTHONPATH": str(ROOT)}
    run(*search, *WORDS[:2], cwd=tmp_path, env=env)
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found) == WORDS[:2] and all(len(rows) == 5 for rows in found.values())
    right = [word in row["words"] for word, rows in found.items() for row in rows]
    assert sum(right) >= 7  # of 10; one place in 4 has the word
    assert (tmp_path / "runs/stage1-AVT/search.png").exists()
    assert (tmp_path / "runs/stage1-AVT/search-2.png").exists()
    kept = next((tmp_path / "runs/stage1-AVT").glob("search-*.npz"))
    made = kept.stat().st_mtime_ns
    assert run(*search, WORDS[0], cwd=tmp_path, env=env).stdout and \
        kept.stat().st_mtime_ns == made  # embedded once
    done = run(*search, "quux", cwd=tmp_path, env=env, check=False)
    assert done.returncode and "knows none of these words" in done.stderr
