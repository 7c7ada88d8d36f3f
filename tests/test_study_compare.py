"""Studies side by side, the queries on which orders disagree, Japanese labels."""

import csv
import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from mcn_ext import report as report_command
from mcn_ext.prepare import demo
from mcn_ext.study import compare, examples, japanese, report
from mcn_ext.study.statistics import MAIN, Study
from tests.test_decode import make_media
from tests.test_study_report import METHODS, write_study

pytestmark = pytest.mark.slow
NAMES = ("video", "audio", "text")


def write(root, flags, quality, **options):
    write_study(root, **options, quality=lambda cell, method: quality)
    spec = json.loads((root / "study.json").read_text())
    (root / "study.json").write_text(json.dumps(spec | {"flags": flags}))
    return root


@pytest.fixture
def two(tmp_path):
    """With another flag, the same methods are far better."""
    return [
        write(tmp_path / "a" / "plain", {"cluster_weight": "1", "lr": "0.1"}, 0.5),
        write(tmp_path / "b" / "without", {"cluster_weight": "0", "lr": "0.1"}, 3.0),
    ]


# ----------------------------------------------------------------------------------- compare
def test_a_flag_that_helps(two, tmp_path, capsys):
    words = [*map(str, two), "--out", str(tmp_path / "out"), "--language", "ja"]
    assert compare.main(words) == 0
    text = (tmp_path / "out/compare.md").read_text()
    assert r"- --cluster_weight: 1, 0" + "\n" in text and "--lr" not in text
    assert text in capsys.readouterr().out
    found = json.loads((tmp_path / "out/compare.json").read_text())
    (row,) = [r for r in found["R@10"] if (r["method"], r["fusion"]) == ("VT_A", "bank")]
    studies = {folder.name: Study(folder) for folder in two}
    direction = f"{MAIN} (bank)"
    means = {name: s.values("VT_A", direction=direction) for name, s in studies.items()}
    assert row["seeds"] == [0, 1]
    for name, of in means.items():  # metrics.json has three digits
        assert row["values"][name] == pytest.approx(of.tolist(), abs=1e-3)
    (pair,) = row["pairs"]
    assert (pair["a"], pair["b"]) == ("without", "plain") and pair["significant"]
    gain = means["without"].mean() - means["plain"].mean()
    assert pair["difference"] == pytest.approx(gain, abs=1e-3) and gain > 10
    with open(tmp_path / "out/figures/differences.csv", newline="", encoding="utf-8-sig") as file:
        header, *rows = csv.reader(file)
    assert header[:3] == ["手法", "統合方法", "比較"] and rows[0][2] == "without - plain"
    for kind in ("png", "pdf"):
        assert (tmp_path / f"out/figures/compare.{kind}").stat().st_size > 1000


def test_what_cannot_be_compared(two, tmp_path, no_pictures):
    out = ["--out", str(tmp_path / "out")]
    other = write(tmp_path / "c" / "other", {}, 1.0, methods=["AVT-30"], seeds=[7])
    grid = write(tmp_path / "grid", {}, 1.0, cells=[{"name": "v0"}, {"name": "v1"}])
    elsewhere = write(tmp_path / "elsewhere", {}, 1.0)
    for file in elsewhere.glob("runs/*/*/metrics.json"):
        file.write_text(file.read_text().replace("eval.h5", "other.h5"))
    for folders, message in (
        (two[:1], "two studies or more"),
        ([two[0], two[0]], "folders of different names"),
        ([two[0], tmp_path], "study.json: not a study"),
        ([two[0], grid], "a grid of noise"),
        ([two[0], other], r"the studies that have it share no seed \(plain \[0, 1\]; other \[7\]"),
        ([two[0], elsewhere], r"evaluated on the same clips: .*plain on .*eval.h5.*other.h5"),
    ):
        with pytest.raises(SystemExit, match=message):
            compare.main([*map(str, folders), *out])
    with pytest.raises(SystemExit, match="holds a study; give another folder"):
        compare.main([*map(str, two), "--out", str(two[0])])
    assert not (tmp_path / "out").exists() and (two[0] / "study.json").exists()
    for run in two[1].glob("runs/*/*/metrics.json"):
        run.unlink()
    with pytest.raises(SystemExit, match="no run of it has been evaluated"):
        compare.main([*map(str, two), *out])


def test_copies_of_one_evaluation_store(two, tmp_path, no_pictures):
    for name, content in (("one.h5", b"x"), ("copy.h5", b"x")):
        (tmp_path / name).write_bytes(content)
    for folder, name in zip(two, ("one.h5", "copy.h5"), strict=True):
        for file in folder.glob("runs/*/*/metrics.json"):
            file.write_text(file.read_text().replace('"eval.h5"', f'"{tmp_path / name}"'))
    assert compare.open_studies(two).keys() == {"plain", "without"}
    (tmp_path / "copy.h5").write_bytes(b"y")
    with pytest.raises(SystemExit, match="the same clips"):
        compare.open_studies(two)


def test_a_study_with_gaps_and_names_with_marks(two, tmp_path):
    odd = two[1].rename(two[1].with_name("a|b $x$ $y_"))
    (odd / "runs/seed1/VT_A/metrics.json").unlink()
    (tmp_path / "out/figures").mkdir(parents=True)
    (tmp_path / "out/figures/mine.pdf").touch()
    assert compare.main([str(two[0]), str(odd), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out/compare.md").read_text()
    assert r"- missing in a\|b $x$ $y\_: VT then A, frozen, seed 1: not evaluated" in text
    with open(tmp_path / "out/figures/r-10.csv", newline="", encoding="utf-8-sig") as file:
        header, *rows = csv.reader(file)
    assert header[2:] == ["seeds", "plain", "a|b $x$ $y_"]
    (row,) = [row for row in rows if row[:2] == ["VT then A, frozen", "sum"]]
    assert row[2] == "1" and "±" not in row[3]  # the one seed that both have
    assert (tmp_path / "out/figures/mine.pdf").exists()


# ---------------------------------------------------------------------------------- examples
@pytest.fixture(scope="module")
def with_captions(tmp_path_factory):
    """A study evaluated on the demo data, with embeddings in which each order is right on another
    tenth of the queries."""
    root = tmp_path_factory.mktemp("captions")
    demo.prepare(root, videos=1)
    n, rng = demo.N_EVAL, np.random.default_rng(0)
    methods = ["AV_T", "VT_A", "AVT-30"]
    write_study(root, methods=methods, seeds=[4, 2], n=n)
    right = {method: np.arange(n) % 10 == i for i, method in enumerate(methods)}
    for run in root.glob("runs/*/*"):
        metrics = json.loads((run / "metrics.json").read_text())
        metrics["youcook2"]["data"] = str(root / "eval.h5")
        (run / "metrics.json").write_text(json.dumps(metrics))
        if run.name in right:
            rows = rng.normal(size=(n, 16))
            wrong = np.where(right[run.name][:, None], rows, np.roll(rows, 1, axis=0))
            of = {"video": rows, "audio": rows, "text": wrong}
            arrays = dict(np.load(run / "youcook2.npz"))
            arrays |= {f"embedding:{name}": of[name].astype(np.float16) for name in NAMES}
            arrays |= {f"valid:{name}": np.ones(n, bool) for name in NAMES}
            ranks = np.where(right[run.name], 1, 50)
            np.savez(run / "youcook2.npz", **arrays | {f"rank:{MAIN}": ranks})
    return root


def test_queries_at_which_an_order_is_ahead(with_captions):
    study = Study(with_captions)
    found = examples.choose(study)
    methods = [*study.best_by_order(), "AVT-30"]
    assert [e["clip"] % 10 for e in found] == [("AV_T", "VT_A", "AVT-30").index(m) for m in methods]
    for ahead, example in zip(methods, found, strict=True):
        for method, answer in zip(methods, example["answers"], strict=True):
            first, caption = answer["found"][0]
            assert answer["label"] == METHODS[method][0] and len(answer["found"]) == 3
            assert (first == example["clip"], answer["rank"]) == (
                (True, 1) if method == ahead else (False, 50)
            )
            assert (caption == example["caption"]) or method != ahead
    text = report.write(with_captions).with_name("report.md").read_text()
    assert (
        f"| {found[0]['caption']} | {study.labels[methods[0]]} | 1 | **{found[0]['caption']}**"
        in text
    )
    assert "Ranks and clips are of seed 2" in text


def test_frames_of_what_is_found(with_captions, tmp_path):
    found = examples.choose(Study(with_captions))
    store = with_captions / "eval.h5"
    names = examples.Store(store).ids()
    (tmp_path / "media").mkdir()
    grey = np.full((48, 64, 3), 120, np.uint8)
    for example in found:
        file = tmp_path / "media" / f"{names[example['clip']]}.mp4"
        make_media(file, times=[0, 5, 10], pictures=[grey] * 3)
    media = examples.find(tmp_path / "media", found)
    assert set(media) == {names[example["clip"]] for example in found}
    words = [str(with_captions), "--media", str(tmp_path / "media"), "--language", "ja"]
    assert report_command.main(words) == 0
    text = (with_captions / "report.html").read_text()
    assert (with_captions / "figures/examples.png").exists() and 'alt="The query' in text
    (tmp_path / "other").mkdir()
    make_media(tmp_path / "other" / "x.mp4", times=[0, 1])
    with pytest.raises(
        SystemExit, match="none of its 1 videos has an evaluation clip's id as its name"
    ):
        examples.find(tmp_path / "other", found)


def test_whole_videos_are_not_taken_for_clips(tmp_path, monkeypatch):
    for name in ("x", "y"):
        make_media(tmp_path / f"{name}.mp4", times=[0, 1])
    ids = ["x", "x#2", "y"]
    monkeypatch.setattr(examples, "Store", lambda path: SimpleNamespace(ids=lambda: ids))
    assert set(examples.find(tmp_path, [{"store": "s.h5"}])) == {"y"}


def test_a_query_only_where_an_order_is_ahead(with_captions, tmp_path):
    root = shutil.copytree(with_captions, tmp_path / "same")
    for file in root.glob("runs/*/*/youcook2.npz"):
        arrays = dict(np.load(file))
        np.savez(file, **arrays | {f"rank:{MAIN}": np.full(demo.N_EVAL, 7)})
    assert examples.choose(Study(root)) == []


def test_no_examples_without_captions_or_embeddings(tmp_path, no_pictures):
    root = write_study(tmp_path, seeds=[0])
    assert examples.choose(Study(root)) == []
    assert "disagree" not in report.write(root).read_text()


# ---------------------------------------------------------------------------------- Japanese
@pytest.mark.parametrize(
    ("english", "expected"),
    [
        ("AV then T, finetune", "AV → T, 微調整"),
        ("VT then A, gentle", "VT → A, gentle"),
        ("video alone", "映像のみ"),
        ("gap video, audio", "ギャップ (映像・音声)"),
        ("mix the second bowl", "mix the second bowl"),
        ("data/words.h5", "data/words.h5"),
        ("one stage, 23 epochs", "一段階、23 エポック"),
        ("text->video+audio R@10, %", "テキスト→映像+音声 R@10, %"),
        ("+3.1 over AV_T", "AV_T との差 +3.1"),
        ("difference, simultaneous 95 % interval", "差 (95 % 同時信頼区間)"),
        ("my_sum v0.5-text", "my_sum v0.5-text"),
    ],
)
def test_labels_in_japanese(english, expected):
    assert japanese.translate(english) == expected


def test_the_report_in_japanese(tmp_path):
    root = write_study(tmp_path, seeds=[0, 1])
    report.write(root, "ja")
    with open(
        root / "figures/result-text-video-audio.csv", newline="", encoding="utf-8-sig"
    ) as file:
        header, *rows = csv.reader(file)
    assert header[:2] == ["手法", "シード数"] and rows[0][0] == "AV → T, 固定"
    assert "AV then T, frozen" in (root / "report.md").read_text()  # the page stays English


def test_every_label_of_a_figure_is_translated():
    from matplotlib import pyplot as plt

    with plt.rc_context(japanese.font()):
        figure, axis = plt.subplots()
        axis.set_yticks([0, 1], ["VT then A, frozen", "chance"])
        axis.set(xlabel="video noise", title="sum")
        axis.plot([0, 1], label="one stage, 30 epochs")
        axis.legend()
        japanese.label(figure)
        figure.canvas.draw()
        texts = {text.get_text() for text in figure.findobj(plt.Text)}
    assert {"VT → A, 固定", "チャンスレベル", "映像のノイズ", "和", "一段階、30 エポック"} <= texts
    plt.close(figure)


def test_the_report_needs_the_font_before_it_removes_anything(tmp_path, monkeypatch):
    root = write_study(tmp_path, seeds=[0])
    (root / "figures").mkdir()
    (root / "figures/kept.png").touch()
    monkeypatch.setitem(sys.modules, "matplotlib_fontja", None)
    with pytest.raises(SystemExit, match="pip install matplotlib-fontja"):
        report_command.main([str(root), "--language", "ja"])
    assert (root / "figures/kept.png").exists()


def test_the_font_is_that_of_these_figures_alone():
    import matplotlib

    before = matplotlib.rcParams["font.family"]
    assert japanese.font() == {"font.family": "IPAexGothic"}
    assert matplotlib.rcParams["font.family"] == before


def test_a_font_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib_fontja", None)
    with pytest.raises(SystemExit, match="pip install matplotlib-fontja"):
        japanese.font()
