"""Windows, overlaps, moments, search: by hand, against brute force, and through the scripts."""

import json

import numpy as np
import pytest
import torch

from mcn_ext.data.store import Store, StoreWriter
from mcn_ext.evaluation import localization, moments, places, retrieval
from mcn_ext.prepare.decode import frame_at
from tests.conftest import ROOT, SMALL, WORDS, call, run, write_store


def test_windows_reach_the_end_and_short_videos_are_one():
    assert moments.windows(12, [5], 0.5).tolist() == [[0, 5], [2.5, 7.5], [5, 10], [7, 12]]
    assert moments.windows(3, [5, 10], 0.5).tolist() == [[0, 3]]
    assert moments.windows(10, [10], 0.25).tolist() == [[0, 10]]
    many = moments.windows(97.3)
    assert many[:, 1].max() == 97.3 and (np.ptp(many, axis=1).round(9) <= 40).all()


class Geometry:
    """Answers like an Embedder: sentence k of a video points where second k of its sound does."""

    def texts(self, texts):
        rows = torch.eye(8)[[int(t) for t in texts]]
        return {"text": rows}, {"text": torch.ones(len(rows), dtype=torch.bool)}

    def stretches(self, store, video, begin, stop):
        self.calls = getattr(self, "calls", 0) + 1
        rows = torch.stack(
            [torch.eye(8)[int(a) : int(b)].sum(0) for a, b in zip(begin, stop, strict=True)]
        )
        return {"audio": rows}, {"audio": torch.ones(len(rows), dtype=torch.bool)}


def test_the_protocol_end_to_end_by_hand(tmp_path):
    """8 s, windows of 2 s every second. Sentence k asks for [k, k + 2] or, in the second video, for
    [k, k + 1]; windows [k - 1, k + 1] and [k, k + 2] hold second k alike. Overlap 1 and 1/3 in the
    first, 1/2 and 1/2 in the second; sentence 0 is only in [0, 2]."""
    writer = StoreWriter(tmp_path / "s.h5", {"mel": {"dim": 40, "rate_hz": 1.0}}, "test")
    for name in ("a", "b"):
        writer.add(
            name, {"mel": np.zeros((8, 40))}, [0, 3], [2, 5] if name == "a" else [1, 4], ["0", "3"]
        )
    store = Store(writer.close())
    sentences = moments.captions_of(store) | {"gone": (np.zeros(1), np.ones(1), ["1"])}
    result = moments.evaluate(
        Geometry(), store, sentences, [("text->audio", "sum")], lengths=[2], stride=0.5
    )
    row = result["text->audio"]
    assert (result["n"], result["videos"], result["missing_videos"]) == (4, 2, 1)
    # a: sentence 0 overlaps 1; 3: (1/3 + 1) / 2. b: 0: 1/2; 3: (1/2 + 1/2) / 2.
    assert row["mIoU"] == pytest.approx(100 * (1 + 2 / 3 + 0.5 + 0.5) / 4, abs=1e-3)
    assert row["R@1 IoU 0.3"] == 100 and row["R@1 IoU 0.7"] == pytest.approx(100 * 1.5 / 4)
    assert result["ceiling"]["R@1 IoU 0.7"] == 50 and result["ceiling"]["R@1 IoU 0.5"] == 100
    assert result["chance"]["R@1 IoU 0.7"] == pytest.approx(100 * 2 / 4 / 7, abs=1e-3)
    assert "n = 4" in moments.table_rows(result)[0][0]


def test_annotations_that_are_none(tmp_path):
    bad = tmp_path / "bad.json"
    for text in (
        "[]",
        "{",
        '{"database": {"a": {"subset": "validation"}}}',
        '{"database": {"a": {"subset": "validation", "annotations": '
        '[{"segment": [5, 2], "sentence": "x"}]}}}',
        '{"database": {}}',
    ):
        bad.write_text(text)
        with pytest.raises(SystemExit, match="--annotations"):
            moments.read_annotations(bad, "validation")


# ------------------------------------------------------------------------ ranking in blocks


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True).clip(1e-12)


def oracle(rows, valid, direction, fusion, bank, temperature):
    """Scores and ranks in plain NumPy, as the definitions read."""

    def side(rows, valid, names):
        total = sum(
            valid[m].numpy()[:, None] * unit(rows[m].numpy().astype(float))
            for m in names.split("+")
        )
        return unit(total) if fusion == "mean" else total

    query, candidate = direction.split("->")
    scores = side(rows, valid, query) @ side(rows, valid, candidate).T
    if fusion == "bank":
        drawn = side(*bank, query) @ side(rows, valid, candidate).T / temperature
        scores = scores / temperature - np.log(np.exp(drawn).sum(axis=0))
    n = len(scores)
    asks, answers = (
        np.any([valid[m].numpy() for m in names.split("+")], axis=0) for names in (query, candidate)
    )
    rank = np.empty(n)
    for i in range(n):
        others = [scores[i, j] - scores[i, i] for j in range(n) if j != i and answers[j]]
        rank[i] = 1 + sum(0.5 if abs(d) < 1e-5 else float(d > 0) for d in others)
    rank[~(asks & answers)] = n
    return scores, answers, rank


@pytest.mark.parametrize("fusion", ["sum", "mean", "bank"])
def test_blocks_rank_as_a_plain_oracle_does(fusion, monkeypatch):
    """With repeated clips (ties), clips without sound, without words, without both."""
    torch.manual_seed(0)
    n = 53
    rows = {m: torch.randn(n, 6) for m in ("text", "video", "audio")}
    for m in ("video", "audio"):
        rows[m][7] = rows[m][3]
        rows[m][20:24] = rows[m][40]
    valid = {m: torch.rand(n) > 0.15 for m in rows}
    for m in rows:
        valid[m][[3, 7]] = True
    bank = {m: torch.randn(9, 6) for m in rows}, {m: torch.ones(9, dtype=torch.bool) for m in rows}
    monkeypatch.setattr(retrieval, "BLOCK", 4 * n * 5)  # 5 queries at a time
    for direction in ("text->video+audio", "video+audio->text", "audio->video"):
        scores = retrieval.Scores((rows, valid), direction, "cosine", fusion, bank, 0.1)
        blocks = [block for _, block in scores.blocks()]
        expected, answers, rank = oracle(rows, valid, direction, fusion, bank, 0.1)
        assert len(blocks) == 11
        np.testing.assert_allclose(torch.cat(blocks)[:, answers], expected[:, answers], atol=2e-4)
        np.testing.assert_array_equal(scores.ranks(), rank)
        assert direction[:4] != "text" or (rank % 1 == 0.5).any()  # some tie


def test_whole_videos_against_loops(monkeypatch):
    """Mean over a video's captions of the maximum over the other's clips; clips that are nothing
    are left out, a video of nothing is a miss."""
    torch.manual_seed(1)
    names = list("aabbbcdd")
    rows = {"text": torch.randn(8, 5), "video": torch.randn(8, 5)}
    valid = {
        "text": torch.tensor([1, 1, 1, 0, 1, 1, 1, 1], dtype=torch.bool),
        "video": torch.tensor([1, 1, 0, 1, 1, 0, 1, 1], dtype=torch.bool),
    }
    unit = {m: torch.nn.functional.normalize(x, dim=1).numpy() for m, x in rows.items()}
    total = np.full((4, 4), -np.inf)
    for u, asking in enumerate("abcd"):
        for v, asked in enumerate("abcd"):
            own = [i for i in range(8) if names[i] == asking and valid["text"][i]]
            theirs = [j for j in range(8) if names[j] == asked and valid["video"][j]]
            if theirs:
                total[u, v] = np.mean(
                    [max(unit["text"][i] @ unit["video"][j] for j in theirs) for i in own]
                )
    expected = [1 + (row > row[k]).sum() for k, row in enumerate(total)]
    expected[2] = 4  # c has a caption, and no clip to be found
    scores = retrieval.Scores((rows, valid), "text->video")
    assert scores.video_ranks(names).tolist() == expected
    monkeypatch.setattr(retrieval, "BLOCK", 4 * 8 * 2)  # a video at a time
    assert scores.video_ranks(names).tolist() == expected


@pytest.mark.parametrize(
    "ids, videos",
    [
        ("GLd3aX16zBg GLd3aX16zBg#2 xHr8X2Wpmno_3 xHr8X2Wpmno_4_5.5", "0 0 2 2"),
        ("my_holiday_1 my_holiday_2 x x#2", "0 1 2 2"),  # not YouTube's: not cut at 11 letters
        ("video000001 video0000012 video000001#2", "0 1 0"),
        ("20230115_103000 20230115_104500 a a#2", "0 1 2 2"),  # a camera's
        ("kitchen_cam_1 kitchen_cam_2 bath a#2 a", "0 1 2 3 3"),
        ("#food #travel x x#2", "0 1 2 2"),  # a title's own "#"
        ("cat#1 cat#2 dog dog#2", "0 1 2 2"),
        ("a#b#2 a#b c", "0 0 2"),
        ("GLd3aX16zBg_1 GLd3aX16zBg_2 other other#2", "0 1 2 2"),  # one is not YouTube's
        ("my_holiday_clip_000 my_holiday_clip_001", None),
        ("a a#2", None),
        ("a b", None),
    ],
)
def test_videos_of_clips_by_their_ids(ids, videos):
    ids = ids.split()
    if videos is None:
        with pytest.raises(SystemExit, match="--whole_videos"):
            retrieval.videos_of(ids)
    else:
        names = retrieval.videos_of(ids)
        assert [names.index(name) for name in names] == list(map(int, videos.split()))


def test_msrvtt_counts_what_is_missing_as_misses():
    eye = torch.eye(4)
    clips = (
        {"text": eye, "audio": eye, "video": eye},
        {
            "text": torch.ones(4, dtype=torch.bool),
            "video": torch.ones(4, dtype=torch.bool),
            "audio": torch.tensor([True, True, False, True]),
        },
    )
    found, _, _ = retrieval.evaluate(clips, retrieval.asked(clips[0]), strict=True, absent=6)
    assert found["text->video+audio"].tolist() == [1, 1, 10, 1] + [10] * 6
    assert found["text->video"].tolist() == [1, 1, 1, 1] + [10] * 6


# ----------------------------------------------------------------------------- steps, in seconds


class Rows:
    """Answers like an Embedder with the rows it is given: text k is axis k, a second what its rows
    of the stream say, as ClipReader cuts them."""

    def __init__(self, stream):
        self.stream = stream

    def texts(self, texts):
        known = torch.tensor([t != "?" for t in texts])
        return {
            "text": torch.eye(4)[[int(t) if t != "?" else 0 for t in texts]] * known[:, None]
        }, {"text": known}

    def stretches(self, store, video, begin, stop):
        clips = store.clips(video, self.stream, begin, stop)
        there = torch.tensor([len(c) > 0 for c in clips])
        rows = [
            torch.from_numpy(c.astype(np.float32)).amax(0)[:4] if len(c) else torch.zeros(4)
            for c in clips
        ]
        return {"audio": torch.stack(rows)}, {"audio": there}


@pytest.mark.parametrize("stream, rate", [("2d", 1.0), ("3d", 1.5), ("mel", 100.0)])
def test_a_second_sees_its_own_rows(tmp_path, stream, rate):
    """Step k is in second 2 k + 1 alone. Of rows that last longer than a second's part of them,
    those that begin in the second or reach into it."""
    dim = 40 if stream == "mel" else 4
    times = np.arange(int(8 * rate)) / rate
    rows = np.zeros((len(times), dim))
    for k in range(4):
        inside = (times >= 2 * k + 1 - (rate == 1.5) / 3) & (times < 2 * k + 2 - (rate == 1.5) / 3)
        rows[inside, k] = 1
    writer = StoreWriter(tmp_path / "s.h5", {stream: {"dim": dim, "rate_hz": rate}}, "test")
    writer.add("a", {stream: rows}, [0], [8], ["x"])
    writer.add("empty", {stream: None}, [0], [8], ["x"])
    score = localization.scorer(Rows(stream), Store(writer.close()))
    got, asked = score("a", 10, ["0", "1", "2", "3", "?"])
    assert asked.tolist() == [True] * 4 + [False]
    for k in range(4):
        assert got[2 * k + 1, k] > 0 and (rate == 1.5 or (got[:, k] > 0).sum() == 1)
    assert (got[8:, :4] == got[:8, :4].amin(0)).all()  # after its end: as bad as the worst
    assert score("empty", 10, ["0"]) is None and score("other", 10, ["0"]) is None


def test_steps_without_a_known_word_are_misses():
    video = {"task": "t", "seconds": 4, "steps": ["?", "1"], "segments": [[0, 0, 2], [1, 2, 4]]}
    scores = torch.tensor([[0.0, 0.0], [0.0, 0.1], [0.0, 1.0], [0.0, 0.9]])
    steps = {"protocol": "crosstask", "videos": {"a": video}}
    got = localization.localize(steps, lambda *_: (scores, torch.tensor([False, True])))
    assert got["recall"] == 50 and got["unknown"] == 1 and got["IoU"] <= 50
    assert "1 steps without a known word" in localization.notice(got)


# ---------------------------------------------------------------------------------- search


def test_search_leaves_out_what_overlaps_and_what_is_empty():
    windows = {
        "video": np.array([0, 0, 0, 1, 1]),
        "begin": np.array([0, 4, 8, 0, 8.0]),
        "stop": np.array([10, 14, 18, 10, 18.0]),
    }
    total = np.array([0.9, 0.8, 0.7, -0.6, -np.inf])
    # 1 overlaps 0 by 6 of 10 s; 2 by 2 of 10; 3 is another video; 4 has nothing in it.
    assert places.best(windows, total, 5) == [0, 2, 3] and places.best(windows, total, 1) == [0]


@pytest.mark.parametrize("ending", ["mkv", "ts", "mp4"])
def test_the_frame_shown_is_the_one_asked_for(tmp_path, ending):
    """Grey levels that say the second, in files that start at 10 s, with few key frames."""
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / f"a[1].{ending}"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        stream.gop_size = 100
        for i in range(120):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 20 * (i // 10), np.uint8))
            frame.pts = i + (0 if ending == "mp4" else 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for at in (0.5, 2.5, 5.5, 8.5):
        image = frame_at([tmp_path / "none.mp4", tmp_path / f"a[1].{ending}"], at)
        assert abs(image.mean() - 20 * int(at)) < 8, (at, image.mean())
    assert frame_at([], 1) is None


def test_places_are_kept_until_something_changes(tmp_path, capsys):
    writer = StoreWriter(tmp_path / "s.h5", {"mel": {"dim": 40, "rate_hz": 1.0}}, "test")
    for name in ("a", "b"):
        writer.add(name, {"mel": np.zeros((8, 40))}, [0, 3], [2, 5], ["x", "z"])
    store, embedder, path = Store(writer.close()), Geometry(), tmp_path / "places.npz"
    embedder.args = {"similarity": "cosine"}

    def made(key):
        embedder.calls = 0
        return places.embed_once(path, key, embedder, store, 2, 0.5), embedder.calls

    windows, calls = made("one")
    assert calls == 2 and len(windows["video"]) == 14
    assert made("one")[1] == 0 and made("two")[1] == 2
    path.write_bytes(path.read_bytes()[:-40])
    assert made("two")[1] == 2 and "damaged" in capsys.readouterr().err
    scores = places.score(windows, embedder.texts(["3"]), None, "cosine")
    best = places.best(windows, scores["total"], 3)
    # [2, 4] and [3, 5] tie; the first of each video.
    assert windows["begin"][best[:2]].tolist() == [2, 2]
    found = places.describe(windows, store, best[0], scores)
    assert found["video"] == "a" and found["words"] == "z" and found["of"]["audio"] > 0.7


@pytest.mark.slow
def test_search_and_moments_on_a_trained_run(tmp_path):
    """A run that has learnt the test data's words finds them, and where in a video they are."""
    data = write_store(tmp_path / "train.h5", n_videos=24, silent_every=0)
    longer = "--epochs 25 --lr 3e-3 --batch_size 8 --log_every 50".split()
    call("train_stage1.py", "--pair", "AVT", "--data", data, *SMALL, *longer, cwd=tmp_path)
    videos = write_store(tmp_path / "videos.h5", n_videos=12, silent_every=0)  # the first of these
    common = "--run runs/stage1-AVT --device cpu".split()
    metrics = tmp_path / "runs/stage1-AVT/metrics.json"

    def evaluate(*words, check=True):
        return call("evaluate.py", *words, *common, cwd=tmp_path, check=check)

    done = evaluate("--moments", videos, "--windows", 2, "--window_stride", 0.5)
    got = json.loads(metrics.read_text())["moments"]
    assert got["n"] == 72 and got["videos"] == 12 and "text->video+audio" in done.stdout
    assert got["text->video+audio"]["R@1 IoU 0.5"] > 2 * got["chance"]["R@1 IoU 0.5"]
    steps = {
        name: {
            "task": str(i % 2),
            "seconds": 12,
            "steps": [t.split()[1] for t in texts],
            "segments": [[k, 2 * k, 2 * k + 2] for k in range(6)],
        }
        for i, (name, (_, _, texts)) in enumerate(moments.captions_of(Store(videos)).items())
    }
    (tmp_path / "videos.h5.steps.json").write_text(
        json.dumps({"protocol": "crosstask", "source": "test", "videos": steps})
    )
    clips = write_store(tmp_path / "clips.h5", n_videos=24, n_captions=1)
    before = metrics.read_text()
    done = evaluate("--youcook2", clips, "--crosstask", clips, check=False)
    assert "clips.h5.steps.json" in done.stderr and metrics.read_text() == before  # at once
    for wrong in ("--annotations x.json", "--windows 3", "--background 1", "--msrvtt_clips 5"):
        done = evaluate("--youcook2", clips, *wrong.split(), check=False)
        assert f"{wrong.split()[0]} is for" in done.stderr
    more = "--msrvtt_clips 30 --all_directions --similarity dot --keep_embeddings".split()
    done = evaluate("--youcook2", clips, "--msrvtt", clips, *more)
    got = json.loads(metrics.read_text())
    own, padded = (got[name]["text->video"]["R@10"] for name in ("youcook2", "msrvtt"))
    assert "6 of 30 clips (--msrvtt_clips) are not in the store: misses" in done.stdout
    assert got["msrvtt"]["n"] == 30 and padded == pytest.approx(own * 24 / 30, abs=1e-3)
    # 4 clips are silent: misses of MSR-VTT's protocol, found by what they show in YouCook2's.
    assert got["msrvtt"]["without"]["audio"] == 4 and got["msrvtt"]["similarity"] == "dot"
    assert "audio+text->video" in got["msrvtt"] and (metrics.parent / "msrvtt.npz").exists()
    done = evaluate("--crosstask", videos)
    got = json.loads(metrics.read_text())
    assert got["moments"]["n"] == 72 and got["crosstask"]["n"] == 72  # both are kept
    assert got["crosstask"]["recall"] > 1.3 * got["crosstask"]["chance"] and "IoD" in done.stdout
    ask = "-m mcn_ext.search --by embeddings --store videos.h5 --window 2 --json found.json"
    search = ask.split() + common
    env = {"PYTHONPATH": str(ROOT)}
    run(*search, *WORDS[:2], cwd=tmp_path, env=env)
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found) == WORDS[:2] and all(len(rows) == 5 for rows in found.values())
    right = [word in row["words"] for word, rows in found.items() for row in rows]
    assert sum(right) >= 7  # of 10; one place in 4 has the word
    folder = metrics.parent
    assert (folder / "search.png").exists() and (folder / "search-2.png").exists()
    kept = next(folder.glob("search-*.npz"))
    made = kept.stat().st_mtime_ns
    assert (
        run(*search, WORDS[0], cwd=tmp_path, env=env).stdout and kept.stat().st_mtime_ns == made
    )  # embedded once
    done = run(*search, "quux", cwd=tmp_path, env=env, check=False)
    assert done.returncode and "knows none of these words" in done.stderr
