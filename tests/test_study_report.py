"""The report of a study, of a made-up folder, whole or with gaps; the page it is written with."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from mcn_ext.data.store import StoreWriter
from mcn_ext.evaluation.metrics import ranks, summarize
from mcn_ext.reference import unit_rows
from mcn_ext.study import pictures as study_pictures
from mcn_ext.study import report as study_report
from mcn_ext.study.page import Bold, Code, Page
from mcn_ext.study.runs import LETTERS, MAIN, Study, StudyError

pytestmark = pytest.mark.slow  # one made-up study for all: its making is most of the time
FOODS = "onion carrot egg rice chicken lemon butter garlic basil salmon".split()
VERBS = "chop fry boil peel whisk".split()
EVIL = "<script>alert('x')</script> | fry & *boil*"


# ------------------------------------------------------------------------ a study, made up
def write_eval_store(path, n, seed=0):
    rng = np.random.default_rng(seed)
    streams = {"2d": {"dim": 4, "rate_hz": 1.0}, "mel": {"dim": 40, "rate_hz": 100.0}}
    writer = StoreWriter(path, streams, "test data")
    meaning = {word: rng.normal(size=16) for word in VERBS + FOODS}
    content = np.zeros((n, 16))
    for i in range(n):
        text = (
            EVIL
            if i == 0
            else f"now {rng.choice(VERBS)} the {rng.choice(FOODS)} and {rng.choice(FOODS)}"
        )
        writer.add(
            f"clip{i:04d}", {"2d": rng.normal(size=(2, 4)), "mel": None}, [0.0], [1.9], [text]
        )
        content[i] = sum(meaning.get(word, 0) for word in text.split())
    writer.close()
    return content + rng.normal(size=content.shape)


def write_run(folder, modalities, quality, content, *, seed, args=None, start=10.0, steps=8):
    """A run folder as training and evaluation leave it; ``quality``: signal to noise."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    (folder / "args.json").write_text(
        json.dumps(
            {
                "batch_size": 16,
                "n_pair": 8,
                "lr": 0.002,
                "seed": seed,
                "cluster_size": 64,
                "similarity": "cosine",
                "demo": False,
                **(args or {}),
            }
        )
    )
    rows = [
        {
            "step": 10 * (i + 1),
            "epoch": i // 4 + 1,
            "lr": 1e-3,
            "total": start * 0.93**i + rng.normal(0, 0.1),
            "contrastive": 0.9 * start * 0.93**i + rng.normal(0, 0.1),
            "cluster": 0.0 if i < 2 else 0.8,
            "reconstruction": 0.1,
            "clips_per_s": 640.0,
            "data_wait": 0.05,
            **({"live_clusters": 60, "largest_share": 0.05} if i >= 2 else {}),
            **{f"rank_{m}": 20.0 + i for m in modalities},
        }
        for i in range(steps)
    ]
    rows.insert(3, {"step": 31, "epoch": 1, "skipped": "the loss is not finite"})
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    n, width = content.shape
    gap = np.eye(width)
    embedding = {
        m: torch.from_numpy(
            quality * content
            + 2 * rng.normal(size=(n, width)) * (1.0 + 0.5 * (m == "audio"))
            + 3 * gap[i]
        )
        for i, m in enumerate(modalities)
    }
    valid = {m: np.ones(n, bool) for m in modalities}
    if "audio" in valid:
        valid["audio"][5] = False
    unit = {m: unit_rows(x.float()) for m, x in embedding.items()}
    directions = [f"{a}->{b}" for a in modalities for b in modalities if a != b]
    if len(modalities) == 3:
        directions = [MAIN, f"{MAIN} (bank)", "video+audio->text", *directions]
    measured, arrays = {"n": n, "data": "eval.h5"}, {}
    for direction in directions:
        better = direction.endswith("(bank)")  # a made-up gain, the same queries found and more
        query, found = (
            sum(unit[m] for m in side.split("+"))
            for side in direction.removesuffix(" (bank)").split("->")
        )
        arrays[f"rank:{direction}"] = rank = ranks(query @ found.T)
        if better:
            arrays[f"rank:{direction}"] = rank = np.maximum(1, rank - 10)
        measured[direction] = summarize(rank, resamples=20)
    (folder / "metrics.json").write_text(json.dumps({"youcook2": measured}))
    arrays |= {f"embedding:{m}": x.half().numpy() for m, x in embedding.items()}
    np.savez(folder / "youcook2.npz", **arrays, **{f"valid:{m}": v for m, v in valid.items()})


METHODS = {  # label, order, encoders, quality
    "AV_T": ("AV then T, frozen", "AV_T", "frozen", 1.2),
    "AV_T-finetune": ("AV then T, finetuned", "AV_T", "finetune", 1.25),
    "VT_A": ("VT then A, frozen", "VT_A", "frozen", 0.9),
    "VT_A-finetune": ("VT then A, finetuned", "VT_A", "finetune", 0.9),
    "AT_V": ("AT then V, frozen", "AT_V", "frozen", 0.7),
    "AT_V-finetune": ("AT then V, finetuned", "AT_V", "finetune", 0.8),
    "AVT-30": ("one stage, equal steps", "AVT", None, 1.0),
    "AVT-23": ("one stage, equal compute", "AVT", None, 0.95),
}


def write_study(root, *, cells=None, methods=METHODS, seeds=(0, 1, 2), n=120, quality=None):
    """A study folder; ``quality(cell, method)`` overrides METHODS'."""
    root.mkdir(parents=True, exist_ok=True)
    content = write_eval_store(root / "eval.h5", n)
    cells = cells or [
        {
            "name": "",
            "data": "train.h5",
            "youcook2": str(root / "eval.h5"),
            "video_noise": None,
            "audio_noise": None,
        }
    ]
    runs = []
    for cell in cells:
        for seed in seeds:
            for number, method in enumerate(methods):
                label, order, encoders, signal = METHODS[method]
                signal = quality(cell, method) if quality else signal
                where = f"{cell['name'] or 'runs'}/seed{seed}"
                first = order.split("_")[0] if "_" in order else None
                stage1 = f"{where}/stage1-{first}" if first else None
                if first and not (root / stage1).exists():
                    write_run(
                        root / stage1,
                        [LETTERS[x] for x in first],
                        0.8,
                        content,
                        seed=seed,
                        args={"pair": first},
                    )
                write_run(
                    root / where / method,
                    ["video", "audio", "text"],
                    signal,
                    content,
                    seed=100 * seed + number,
                    start=8.0,
                    steps=4 if first else 12,
                    args={"lr": 0.001} if method == "AVT-23" else {},
                )
                runs.append(
                    {
                        "cell": cell["name"],
                        "method": method,
                        "order": order,
                        "encoders": encoders,
                        "seed": seed,
                        "label": label,
                        "stage1": stage1,
                        "run": f"{where}/{method}",
                        "flops": 1.5e12,
                        "epochs": [20, 10] if first else [30],
                        **(
                            {}
                            if first
                            else {"steps_of": [m for m in methods if "_" in m]}
                            if method == "AVT-30"
                            else {"baseline_of": ["AV_T", "AT_V"]}
                        ),
                    }
                )
    (root / "study.json").write_text(
        json.dumps(
            {
                "format": "mcn-study",
                "version": 1,
                "command": "python -m mcn_ext.study --seeds 3",
                "flags": {},
                "cells": cells,
                "runs": runs,
            }
        )
    )
    return root


@pytest.fixture(scope="module")
def study_folder(tmp_path_factory):
    """One whole study, its report written."""
    root = write_study(
        tmp_path_factory.mktemp("study"),
        seeds=(0, 1),
        n=80,
        methods=("AV_T", "AV_T-finetune", "VT_A", "AVT-30", "AVT-23"),
    )
    with pytest.MonkeyPatch.context() as patch:
        style = study_pictures.style
        patch.setattr(
            study_pictures,
            "style",
            lambda plt: (style(plt), plt.rcParams.update({"savefig.dpi": 50})),
        )
        study_report.write(root)
    return root


class Checker(HTMLParser):
    """Tags that do not nest, and anything that runs or is loaded from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.open, self.wrong, self.images = [], [], 0
        self.feed(text)
        self.wrong += self.open

    def handle_starttag(self, tag, attrs):
        self.images += tag == "img"
        if tag == "script" or any(
            key.startswith("on") or (value or "").startswith("http") for key, value in attrs
        ):
            self.wrong.append((tag, attrs))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}>")


# ------------------------------------------------------------------------------- the page
def test_page_escapes_everything(tmp_path):
    page = Page(EVIL)
    page.heading(EVIL)
    page.paragraph(EVIL, Bold(EVIL), Code(EVIL))
    page.table([EVIL, "b"], [[Bold(EVIL), "two\nlines"], [Code("a|b"), "_c_ d_e"]])
    page.bullets([EVIL, (EVIL, Bold("x"))])
    path = page.save(tmp_path)
    text = path.read_text()
    assert Checker(text).wrong == []
    assert "<script" not in text and text.count("&lt;script&gt;") == 10  # title and h1 are two
    markdown = (tmp_path / "report.md").read_text()
    assert "<script" not in markdown.replace(f"`{EVIL}`", "")  # in a code span it is text
    for row in re.findall(r"^\|.*", markdown, re.M):
        assert len(re.findall(r"(?<!\\)\|", row)) == 3, row  # no cell broke its row
    assert "two<br>lines" in text and "two<br>lines" in markdown
    assert r"\_c\_ d_e" in markdown and r"fry &amp; \*boil\*" in markdown


# -------------------------------------------------------------------------------- the report
def test_the_answer_comes_first(study_folder):
    text = (study_folder / "report.md").read_text()
    answer = text.split("\n\n")[1]
    study = Study(study_folder)
    best = max(["AV_T", "AV_T-finetune"], key=study.mean)
    assert answer.startswith(f"**{study.labels[best]} wins: it finds the right clip")
    assert f"for {study.mean(best):.1f} ± " in answer and "% of 80 captions" in answer
    assert "(R@10; chance 12.5 %; 2 seeds)" in answer
    compare = study.compare(best, study.by_order()[1])
    points = text.split("\n\n")[2]
    assert f"- {compare['difference']:.1f} points above the next order" in points
    assert points.count("one stage of equal") == 2 and "not complete" not in text
    values = study.values("AV_T", "R@5")
    assert f"{values.mean():.1f} ± {values.std(ddof=1):.1f}" in text
    assert "every run: `batch_size 16`" in text
    assert re.search(
        r"\| `lr` \| `0.002` \| all others \|\n\|  \| `0.001` \| one stage, equal com", text
    )
    assert "Nothing: every run of the study was trained" in text
    # 2 seeds, 2 stages, one skipped each; 16 x 8 clips x (80 + 40 steps); 640 clips a second.
    assert "| AV then T, frozen | 4 | 60 of 64 | 5.0 |" in text
    assert "| AV then T, frozen | 20 + 10 | 15,360 | 24 | 1.50e+12 |" in text


def test_html_stands_alone(study_folder):
    text = (study_folder / "report.html").read_text()
    checked = Checker(text)
    assert checked.wrong == []
    pictures = sorted(p.stem for p in (study_folder / "pictures").iterdir())
    assert pictures == sorted("recall differences curves forgetting geometry space words".split())
    assert checked.images == len(pictures)
    assert text.count("data:image/png;base64,iVBOR") == len(pictures)


def test_captions_are_escaped(study_folder, no_pictures, monkeypatch):
    from mcn_ext.study import examples as study_examples

    monkeypatch.setattr(study_examples, "pick", lambda ranks: [("Evil", 0)])
    study_report.write(study_folder)
    text = (study_folder / "report.html").read_text()
    assert "<script" not in text and "&lt;script&gt;alert(&#x27;x&#x27;)" in text
    assert Checker(text).images == 0


def test_examples_are_what_the_ranks_say(study_folder):
    from mcn_ext.study.examples import pick, top

    run = Study(study_folder).of("AV_T")[0]
    rank = run.final.ranks[MAIN]
    found = top(run, list(range(len(rank))))
    for query, clips in enumerate(found):
        assert (query in clips) == (rank[query] <= 3), (query, clips, rank[query])
    table = [np.array([1, 1, 50, 30]), np.array([2, 40, 60, 12])]
    assert [q for _, q in pick(table)] == [0, 1, 2]
    assert [q for _, q in pick([np.array([1, 1]), np.array([1, 1])])] == [0, None, None]


def test_geometry_and_principal_axes(study_folder):
    study = Study(study_folder)
    rows = {(r["method"], r["pair"]): r for r in study_pictures.geometry(study)}
    e = [r.final.embeddings() for r in study.of("VT_A")]
    expected = np.mean([float((x["video"] - x["audio"]).square().sum(1).nanmean()) for x in e])
    assert rows["VT_A", "video-audio"]["alignment"] == pytest.approx(expected, rel=1e-5)
    assert all(r["uniformity"] < 0 for r in rows.values())
    for shape in ((40, 7), (7, 40)):
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
        points, share = study_pictures.principal(x)
        u, s, _ = np.linalg.svd((x.double() - x.double().mean(0)).numpy(), full_matrices=False)
        np.testing.assert_allclose(points.abs(), np.abs(u * s)[:, :2], atol=1e-8)
        np.testing.assert_allclose(share, s[:2] ** 2 / (s**2).sum(), atol=1e-8)


def test_forgetting(study_folder):
    study = Study(study_folder)
    others = ["fry rice"] * 3 + ["boil"] * 3  # captions of another store
    assert study_pictures.word_map(None, study, "VT_A", others) is None
    rows = study_pictures.forgetting(study)
    assert len(rows) == 6 and {r["direction"] for r in rows if r["method"] == "VT_A"} == {
        "video->text",
        "text->video",
    }
    run = study.of("VT_A")
    row = next(r for r in rows if r["method"] == "VT_A" and r["direction"] == "text->video")
    after = np.mean([100 * (r.final.ranks["text->video"] <= 10).mean() for r in run])
    before = np.mean([100 * (r.first.ranks["text->video"] <= 10).mean() for r in run])
    assert (row["before"], row["after"]) == pytest.approx((before, after), abs=1e-3)
    assert row["change"]["difference"] == pytest.approx(after - before, abs=1e-3)
    values, start = study_pictures.joined(run[0], "total")
    assert start == 80 and max(values) == 120 and np.isnan(values[80.5])
    assert len(values) == 8 + 4 + 1


def test_partial_and_broken_studies(tmp_path, no_pictures):
    root = write_study(tmp_path / "s", methods=["AV_T", "VT_A", "AVT-30"], seeds=(0, 1), n=30)
    (root / "runs/seed1/VT_A/metrics.json").unlink()
    (root / "runs/seed0/AVT-30/log.jsonl").write_text(
        '{"step": 10, "total": NaN, "clips_per_s": 5.0, "rank_text": 1.0}\n{"step"'
    )
    (root / "runs/seed0/stage1-AV/youcook2.npz").write_bytes(b"PK not a zip")
    (root / "runs/seed1/AVT-30/metrics.json").write_text("{")
    (root / "eval.h5").unlink()
    text = study_report.write(root).with_name("report.md").read_text()
    missing = text.split("## What is missing")[1]
    assert "- VT then A, frozen, seed 1: not evaluated" in missing
    assert "- one stage, equal steps, seed 1: not evaluated" in missing
    assert "- AV then T, frozen, seed 0, stage 1: no youcook2.npz" in missing
    assert missing.count("\n- ") == 3 and "not complete: 3 gaps" in text
    assert "1 seed both have" in text  # the winner is compared on the seed VT_A has
    assert (
        "one stage, equal steps, seed 0: the text embeddings lie on one line (effective rank "
        "below 2); the last loss is not finite" in text
    )
    for run in root.glob("runs/*/*/metrics.json"):
        run.unlink()
    assert "Nothing to compare yet" in study_report.write(root).read_text()
    (root / "study.json").write_text('{"format": "mcn-study", "version": 1, "runs": []}')
    assert "Nothing to compare yet" in study_report.write(root).read_text()
    (root / "study.json").write_text('{"format": "other"}')
    with pytest.raises(StudyError, match="not a study of format mcn-study"):
        study_report.write(root)


def test_report_command(study_folder, no_pictures, capsys):
    from mcn_ext.study import curves as report

    assert report.main([str(study_folder)]) == 0
    assert capsys.readouterr().out.strip() == str(study_folder / "report.html")
    run = study_folder / "runs/seed0/AV_T"
    args = json.loads((run / "args.json").read_text())
    (run / "args.json").write_text(
        json.dumps({"data": "x.h5", "epochs": 3, "temperature": 0.1, **args})
    )
    assert report.main([str(run)]) == 0
    html, markdown = ((run / f"report.{end}").read_text() for end in ("html", "md"))
    assert Checker(html).wrong == [] and "text-&gt;video+audio" in html
    assert "| chance | 1.2 |" in markdown and "1 steps were skipped" in markdown
