"""Clips found by the words spoken in them: BM25 and rank fusion against plain definitions, then
through prepare, evaluate.py and search."""

import csv
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mcn_ext import search
from mcn_ext.data.store import Store, StoreWriter, validate
from mcn_ext.data.words import WordVectors
from mcn_ext.evaluation import places, retrieval
from mcn_ext.evaluation.search import excerpt
from mcn_ext.evaluation.words import BM25, bm25, reciprocal_ranks, terms
from tests.conftest import SMALL, WORDS, call, run, write_store
from tests.test_evaluate import make_run


def textbook(documents, queries, k1, b):
    """BM25 in Python's floats, a document and a term at a time."""
    documents = [document.split() for document in documents]
    mean = sum(map(len, documents)) / len(documents)
    scores = np.zeros((len(queries), len(documents)))
    for q, query in enumerate(queries):
        for d, document in enumerate(documents):
            for term in query.split():
                n = sum(term in other for other in documents)
                f = document.count(term)
                norm = k1 * (1 - b + b * len(document) / mean)
                idf = math.log(1 + (len(documents) - n + 0.5) / (n + 0.5))
                scores[q, d] += idf * f * (k1 + 1) / (f + norm) if f else 0
    return scores


@pytest.mark.parametrize("k1, b", [(1.2, 0.75), (2.0, 0.0), (0.5, 1.0)])
def test_bm25_is_the_textbook_formula(k1, b):
    rng = np.random.default_rng(0)
    made = [" ".join(rng.choice(WORDS, n)) for n in rng.integers(0, 12, 60)]
    documents, queries = made[:40], made[40:] + ["zebra", "", "egg egg rice"]
    found = bm25(documents, queries, k1, b)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, textbook(documents, queries, k1, b), rtol=1e-6, atol=1e-7)
    assert not found[-3:-1].any()


@pytest.mark.parametrize("documents", [[], [""], ["", "...", "!"], ["egg"]])
def test_bm25_of_little_is_finite(documents):
    found = bm25(documents, ["egg", ""])
    assert found.shape == (2, len(documents)) and np.isfinite(found).all()
    assert BM25(documents).scores([]).shape == (0, len(documents))


def test_terms():
    assert terms("Chopping the ONIONS, she's chopped!") == ["chop", "the", "onion", "she", "chop"]
    assert terms("玉ねぎ、LED") == ["玉ね", "ねぎ", "led"]
    assert terms("卵") == ["卵"] and terms("T玉ねぎ")[0] == "t玉"


def test_reciprocal_ranks_share_ties():
    rng = np.random.default_rng(0)
    scores = torch.tensor(rng.integers(0, 5, (30, 11)).astype(np.float32))
    scores[3] = 2.0
    scores[4, :6] = -torch.inf
    better = (scores[:, None, :] > scores[:, :, None]).sum(-1)
    ties = (scores[:, None, :] == scores[:, :, None]).sum(-1) - 1
    assert_close(reciprocal_ranks(scores), 1 / (60 + 1 + better + ties / 2))


def test_words_decide_where_embeddings_cannot():
    """Query 0 has no known word, clip 1 neither picture nor sound; 2 and 3 look the same."""
    rows = torch.tensor([[1.0, 0], [0, 1], [1, 1], [1, 1]])
    valid = {"text": torch.tensor([False, True, True, True]), "video": torch.ones(4).bool()}
    valid["video"][1] = False
    clips = {"text": rows, "video": rows}, valid
    asked = ["egg", "rice", "onion", "carrot"]
    by_words = retrieval.WordScores(asked, ["egg", "rice", "onion", ""])
    wanted = retrieval.asked(["video", "text"], ["words+sum"])
    found, _, _ = retrieval.evaluate(clips, wanted, words=by_words)
    assert found["text->video"].tolist() == [4, 4, 1.5, 1.5]
    assert found["text->words"].tolist() == [1, 1, 1, 2.5]
    # Clip 1 is last of 4 by its looks: 1/61 + 1/64 is less than 1/61.5 + 1/63 of clips 2 and 3.
    assert found["text->video (words+sum)"].tolist() == [1, 3, 1, 1.5]


# -------------------------------------------------------------------- prepare and evaluate.py


@pytest.fixture
def spoken(convert, tmp_path):
    """The evaluation clips as a pickle, and what is said in them: every third nothing, every
    second another clip's caption."""
    store = Store(write_store(tmp_path / "e.h5", 24, 1, seed=1, silent_every=6))
    items, captions = [], [store.caption_texts(i)[0] for i in range(24)]
    for i, name in enumerate(store.ids()):
        end = store.caption_times(i)[2]
        rows = {s: store.clips(i, s, [0.0], end)[0] for s in store.dims}
        item = {s: rows[s].max(0).astype(np.float32) for s in ("2d", "3d")}
        audio = torch.tensor(rows["mel"].T.astype(np.float32)) if len(rows["mel"]) else None
        items.append(item | {"id": name, "caption": captions[i], "audio": audio})
    said = [f"{captions[(i + i % 2) % 24]} you know" if i % 3 else "" for i in range(24)]
    with open("clips.pkl", "wb") as file:
        pickle.dump(items, file)
    return items, said


def put(path, content):
    with open(path, "w") as file:
        json.dump(content, file)
    return path


def test_speech_is_prepared_by_id_or_by_video_and_caption(convert, spoken, tmp_path):
    items, said = spoken
    by_id = {item["id"]: text for item, text in zip(items, said, strict=True)}
    common = ["youcook2", "clips.pkl", "--speech"]
    assert ", 16 with words spoken" in convert(*common, put("a.json", by_id | {"x": "y"}))[0]
    assert Store("out.h5").speech() == said
    assert validate("out.h5")["streams"][-1] == "video/speech: the words spoken in 16 of 24 videos"
    # The ids of YouCook2's clips name their video, so that captions tell them apart.
    for k, item in enumerate(items):
        item["id"], item["caption"] = "GLd3aX16zBg", f"step {k} of it"
    with open("clips.pkl", "wb") as file:
        pickle.dump(items, file)
    listed = [
        {"video_id": f"GLd3aX16zBg_{k}_{k + 9}", "desc": f"Step {k}  of it", "subtitle": text}
        for k, text in enumerate(said)
    ]
    convert(*common, put("b.json", listed[::-1]), out="b.h5")
    assert Store("b.h5").speech() == said and Store("b.h5").ids()[1] == "GLd3aX16zBg#2"


@pytest.mark.parametrize(
    "content, message",
    [
        ({"other": "words"}, "nothing in it is of these clips: its ids are like other, the clips'"),
        ([{"video_id": "x"}], r"expected JSON .id: text., or a list .*KeyError: 'subtitle'"),
        ({"x": ["nested"]}, "a list where a text is expected"),
        (3, "TypeError"),
    ],
)
def test_speech_of_something_else_is_refused(convert, spoken, content, message):
    with pytest.raises(SystemExit, match=f"--speech a.json: .*{message}"):
        convert("youcook2", "clips.pkl", "--speech", put("a.json", content))


def recalls(rank):
    return {f"R@{k}": pytest.approx(100 * (rank <= k).mean(), abs=1e-3) for k in (1, 5, 10)}


def test_words_are_ranked_alone_and_with_embeddings(convert, spoken, tmp_path):
    items, said = spoken
    by_id = {item["id"]: text for item, text in zip(items, said, strict=True)}
    convert("youcook2", "clips.pkl", "--speech", put("a.json", by_id))
    # Without a run.
    done = call("evaluate.py --youcook2 out.h5 --fusion words", cwd=".")
    assert "words spoken in 16 of 24, used in evaluation only" in done.stdout
    found = json.loads((tmp_path / "runs/words/metrics.json").read_text())["youcook2"]
    scores = bm25(said, [item["caption"] for item in items])
    own = np.diag(scores)[:, None]
    rank = 1 + (scores > own).sum(1) + ((scores == own).sum(1) - 1) / 2
    assert found["text->words"].items() >= recalls(rank).items()
    # With one.
    train = write_store(tmp_path / "train.h5")
    WordVectors(list(WORDS), np.eye(len(WORDS), 10), "test").save(tmp_path / "w.npz")
    call("train_stage1.py --pair VT --word2vec w.npz --data", train, *SMALL, cwd=".")
    flags = "--fusion words+sum words+bank --keep_embeddings"
    done = call("evaluate.py --device cpu --youcook2 out.h5", flags, cwd=".")
    with np.load("runs/stage1-VT/youcook2.npz") as file:
        kept = {name: file[name] for name in file}
    found = json.loads((tmp_path / "runs/stage1-VT/metrics.json").read_text())["youcook2"]
    names = ["text->video", "text->video (words+sum)", "text->video (bank)"]
    names += ["text->video (words+bank)", "text->words"]
    assert [name for name in found if name.startswith("text->")] == names
    assert "video->text (words+sum)" not in found
    np.testing.assert_array_equal(kept["rank:text->words"], rank)
    # The fused ranks, from the embeddings that were kept (fp16) and BM25.
    text, video = (kept[f"embedding:{m}"].astype(np.float32) for m in ("text", "video"))
    cosine = torch.nn.functional.normalize(torch.tensor(text)) @ (
        torch.nn.functional.normalize(torch.tensor(video)).T
    )
    fused = (reciprocal_ranks(cosine) + reciprocal_ranks(torch.tensor(scores))).numpy()
    own = np.diag(fused)[:, None]
    expected = 1 + (fused > own).sum(1) + ((fused == own).sum(1) - 1) / 2
    assert np.abs(kept[f"rank:{names[1]}"] - expected).max() <= 1  # by rounding to fp16
    more = found["gains"][names[1]]
    assert more["than"] == "text->video" and f"{names[1]} less text->video" in done.stdout
    a, b = (kept[f"rank:{name}"] <= 10 for name in names[1::-1])
    assert more["R@10"] == pytest.approx(100 * (a.mean() - b.mean()), abs=1e-3)
    assert more["R@10_ci95"][0] <= more["R@10"] <= more["R@10_ci95"][1]


def test_a_gallery_and_its_export(convert, spoken, tmp_path):
    """R@K from the CSV are those of metrics.json, whoever ranks, and misses count."""
    items, said = spoken
    by_id = {item["id"]: text for item, text in zip(items, said, strict=True)}
    convert("youcook2", "clips.pkl", "--speech", put("a.json", by_id))
    ids = [item["id"] for item in items]
    Path("only.txt").write_text("\n".join([*ids[3:20], "", "gone", ids[0]]))
    train = write_store(tmp_path / "train.h5")
    WordVectors(list(WORDS), np.eye(len(WORDS), 10), "test").save(tmp_path / "w.npz")
    call("train_stage1.py --pair VT --word2vec w.npz --data", train, *SMALL, cwd=".")
    command = "evaluate.py --device cpu --youcook2 out.h5 --fusion words+sum --all_directions"
    command += " --export a.csv --export_mteb mteb"
    for flags, n, ranked in (
        ("", 24, ids),
        ("--only only.txt", 19, [ids[0], *ids[3:20], "gone"]),
        ("--only only.txt --missing drop", 18, [ids[0], *ids[3:20]]),
    ):
        done = call(command, flags, cwd=".")
        metrics = json.loads((tmp_path / "runs/stage1-VT/metrics.json").read_text())["youcook2"]
        with open("a.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert metrics["n"] == n and f"n = {n}" in done.stdout
        for direction in ("text->video", "text->video (words+sum)", "text->words", "video->text"):
            of = [row for row in rows if row["direction"] == direction]
            assert [row["id"] for row in of] == ranked
            rank = np.array([float(row["rank"]) for row in of])
            assert metrics[direction].items() >= recalls(rank).items()
            for row in of:
                place, top = float(row["rank"]), [row[str(k)] for k in range(1, 11)]
                assert set(top) <= {*ranked, ""} and (row["id"] == "gone") == (not any(top))
                if place == 1:
                    assert top[0] == row["id"]
                elif place > 10.5:
                    assert row["id"] not in top
        for task, direction in (("T2V", "text->video"), ("V2T", "video->text")):
            result = json.loads(Path(f"mteb/sum/YouCook2{task}Retrieval.json").read_text())
            rank = np.array([float(r["rank"]) for r in rows if r["direction"] == direction])
            (scores,) = result["scores"]["test"]
            for k in (1, 5, 10):
                assert scores[f"recall_at_{k}"] == pytest.approx((rank <= k).mean(), abs=1e-5)
            ndcg = sum(1 / math.log2(1 + r) for r in rank if r <= 10) / n
            assert scores["main_score"] == pytest.approx(ndcg, abs=1e-5)
        assert not list(Path("mteb").glob("*words*")) and f"its 3104 clips; here {n}" in done.stdout
        if flags:
            assert "1 of 19 not in the store (gone)" in done.stdout
            assert metrics["gallery"]["missing"] == ["gone"]
    for content, message in (
        (b"", "none of its 0 ids"),
        (b"x\ny", "none of its 2 ids, such as x, is in out.h5, where ids are like video000000"),
        (b"\xff", "cannot be read"),
        (b"video000000\nvideo000000", "1 ids are there more than once"),
    ):
        Path("bad.txt").write_bytes(content)
        done = call(command, "--only bad.txt", cwd=".", check=False)
        assert f"--only bad.txt: {message}" in done.stderr


def test_what_words_cannot_do_is_refused(convert, spoken, tmp_path):
    convert("youcook2", "clips.pkl")
    for flags, message in (
        ("--youcook2 out.h5", "out.h5 does not hold the words spoken in its clips; python -m"),
        ("--youcook2 out.h5 --run x", "reads no run: leave out --run"),
        ("--youcook2 out.h5 --crosstask out.h5", "--crosstask and --miningyoutube need a run"),
        ("--moments out.h5", "both asked for and searched; give --annotations JSON"),
    ):
        done = call("evaluate.py --fusion words", flags, cwd=".", check=False)
        assert done.returncode and message in done.stderr, done.stderr


def test_moments_by_words(tmp_path):
    """Captions of 2 s say a word each; sentences ask for the word that is said at [4, 6]."""
    store = write_store(tmp_path / "s.h5", n_videos=3)
    database, read = {}, Store(store)
    for i, name in enumerate(read.ids()):
        said = read.caption_texts(i)
        asked = f"please {said[2].split()[1]}ing"
        annotation = {"segment": [4, 6], "sentence": asked}
        database[name] = {"subset": "validation", "duration": 12, "annotations": [annotation]}
    put(tmp_path / "a.json", {"database": database})
    flags = "--annotations a.json --fusion words --windows 2 --window_stride 1"
    call("evaluate.py --moments s.h5", flags, cwd=tmp_path)
    found = json.loads((tmp_path / "runs/words/metrics.json").read_text())["moments"]
    hits = []
    for i in range(3):
        said = [text.split()[1] for text in read.caption_texts(i)]
        hits.append((said[2] == np.array(said))[2] / said.count(said[2]))
    assert found["text->words"]["R@1 IoU 0.7"] == pytest.approx(100 * np.mean(hits), abs=1e-3)
    assert found["chance"]["R@1 IoU 0.7"] == pytest.approx(100 / 6, abs=1e-3)


# ------------------------------------------------------------------------------------- search


def test_windows_are_ranked_by_words_by_embeddings_and_by_both():
    """0 is silent, 1 seen and said, 2 only said, 3 nothing, 4 seen, and says something else."""
    nan, none = np.nan, -np.inf
    sentence = {"text": torch.tensor([[1.0, 0]])}, {"text": torch.ones(1).bool()}
    made = {
        "video": np.arange(5),
        "begin": np.zeros(5),
        "stop": np.ones(5),
        "embedding:video": np.array([[1, 0], [0, 1], [1, 0], [1, 0], [-1, 0]], np.float16),
        "valid:video": np.array([1, 1, 0, 0, 1], bool),
    }
    words = np.array([nan, 2, 3, nan, 0], np.float32)
    ranks = np.array([[1, 2, 4.5, 4.5, 3], [4, 2, 1, 4, 4]])  # those that tie at their mean
    both = (1 / (60 + ranks)).sum(axis=0)
    both[3] = none
    for asked, said, total, best in (
        (sentence, None, [1, 0, none, none, -1], [0, 1, 4]),
        (None, words, [none, 2, 3, none, none], [2, 1]),
        (sentence, words, both, [1, 0, 2, 4]),
    ):
        scores = places.score(made, asked, said, "cosine")
        np.testing.assert_allclose(scores["total"], total, rtol=1e-6)
        assert places.best(made, scores["total"], 5) == best
    np.testing.assert_array_equal(scores["video"], [1, 0, nan, nan, -1])


def test_the_part_of_what_is_said_that_was_asked_for():
    said = "so hello and welcome back to my kitchen where today we crack some eggs"
    assert excerpt(said, "cracking eggs", 5) == "... today we crack some eggs"
    assert excerpt(said, "hello", 5) == "so hello and welcome back" and excerpt("", "a") == ""


def test_search_by_words_needs_no_run(tmp_path):
    store = Store(write_store(tmp_path / "s.h5", n_videos=4))
    flags = "-m mcn_ext.search --by words --store s.h5 --window 2 --stride 1 --json f.json"
    done = run(flags, "'frying the rice' zebra", cwd=tmp_path)
    assert "search.png" in done.stdout and "score: BM25" in done.stdout
    assert (tmp_path / "search.png").exists() and not (tmp_path / "runs").exists()
    said = {
        (name, 2.0 * k): text
        for i, name in enumerate(store.ids())
        for k, text in enumerate(store.caption_texts(i))
    }
    scores = dict(zip(said, bm25(list(said.values()), ["frying the rice"])[0], strict=True))
    answers = json.loads((tmp_path / "f.json").read_text())
    assert answers["zebra"] == [] and "nothing found: none of these words is" in done.stdout
    best = sorted(scores.values(), reverse=True)[:5]
    assert [row["score"] for row in answers["frying the rice"]] == pytest.approx(best, abs=1e-5)
    for row in answers["frying the rice"]:
        where = row["video"], row["start"]
        assert row["by"] == "words" and row["words"] == said[where] and row["end"] == where[1] + 2
        assert row["of"] == {"words": pytest.approx(scores[where], abs=1e-4)}


@pytest.fixture
def find(tmp_path, monkeypatch, no_pictures):
    """Searches in the process, in windows of 2 s without overlap; returns the answers."""
    monkeypatch.chdir(tmp_path)

    def command(*words):
        flags = "--store s.h5 --window 2 --stride 1 --top 99 --device cpu --json f.json".split()
        assert search.main([*flags, *words]) == 0
        return json.loads((tmp_path / "f.json").read_text())

    return command


def test_search_fuses_the_ranks_of_words_and_embeddings(find, tmp_path, capsys):
    store = Store(write_store(tmp_path / "s.h5", n_videos=5, n_captions=2))
    said = {text.split()[1] for text in store.texts()}
    known, unsaid = sorted(said)[0], sorted(set(WORDS) - said)[0]
    with pytest.raises(SystemExit, match="no run in .*; --by words needs no run"):
        find(known)
    make_run(tmp_path / "runs/stage1-AVT")
    with pytest.raises(SystemExit, match="the run knows none of these words"):
        find("now", "--by", "embeddings")
    ranked = {by: find(known, "--by", by)[known] for by in ("words", "embeddings")}
    answers = find(known, unsaid, "now", "zebra")  # both, since the store has words
    rows = {(row["video"], row["start"]): row for row in answers[known]}
    assert len(rows) == 10 and "score: fused ranks" in capsys.readouterr().out
    scores = torch.zeros(2, 10)
    for by, values in zip(ranked, scores, strict=True):
        for row in ranked[by]:
            values[list(rows).index((row["video"], row["start"]))] = row["score"]
            assert row["of"].items() <= rows[row["video"], row["start"]]["of"].items()
    fused = reciprocal_ranks(scores).sum(0).tolist()
    assert fused == pytest.approx([row["score"] for row in answers[known]], abs=2e-6)
    assert {row["by"] for row in answers[known]} == {"both"}
    assert any(row["of"]["audio"] is None for row in answers[known])  # the fifth is silent
    # What one of both does not know, the other ranks.
    assert {row["by"] for row in answers[unsaid]} == {"embeddings"}
    assert {row["by"] for row in answers["now"]} == {"words"} and len(answers["now"]) == 10
    assert answers["zebra"] == []


def test_search_in_clips_that_hold_what_is_said_and_in_none(find, capsys):
    streams, rows = {"2d": {"dim": 4, "rate_hz": 1.0}}, {"2d": np.zeros((4, 4))}
    writer = StoreWriter("s.h5", streams, "test", speech=True)
    for name, speech in zip("abc", ["so crack the eggs", "", "stir"], strict=True):
        writer.add(name, rows, [0], [4], ["a caption about rice"], speech)
    writer.close()
    answers = find("eggs", "rice", "--by", "words")
    assert [(row["video"], row["start"]) for row in answers["eggs"]] == [("a", 0), ("a", 2)]
    assert answers["eggs"][1]["words"] == "so crack the eggs" and not answers["rice"]
    assert "6 windows of 3 videos, words spoken in 4" in capsys.readouterr().out
    writer = StoreWriter("none.h5", streams, "test")
    writer.add("a", rows, [], [], [])
    writer.close()
    with pytest.raises(SystemExit, match="--by words: none.h5 does not hold the words spoken"):
        find("eggs", "--store", "none.h5", "--by", "words")
    with pytest.raises(SystemExit, match="or name one with --run$"):  # by embeddings
        find("eggs", "--store", "none.h5")
