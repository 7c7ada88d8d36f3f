"""CONTRIBUTING's recipe for a fourth modality, followed to the letter on a copy of the project."""

import json
import re
import shutil
import textwrap

import h5py
import numpy as np
import pytest
import torch

from mcn_ext.store import main as describe
from tests.conftest import ROOT, SMALL, WORDS, run, write_store

pytestmark = pytest.mark.slow


def blocks(title):
    """The lines of code that a recipe shows, a text for each block."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    text = text.split(title)[1].split("\n###")[0]
    found = re.findall(r"(?:^ {8}.*\n|^\n(?= {8}))+", text, re.MULTILINE)
    return [textwrap.dedent(block).strip("\n") + "\n" for block in found]


def insert(path, before, code, indent):
    """Add lines of code before the place that ``before`` shows, as a person would."""
    text = path.read_text()
    assert text.count(before) == 1
    path.write_text(text.replace(before, textwrap.indent(code, " " * indent) + before))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project with depth features as its fourth modality: three files changed."""
    copy = tmp_path_factory.mktemp("project")
    for name in ("train_stage1.py", "train_stage2.py", "evaluate.py"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "mcn_ext", copy / "mcn_ext", ignore=shutil.ignore_patterns("*.pyc"))
    row, model, clips = blocks("### 9. A fourth modality")
    modules, method = model.split("\n\n")
    table = copy / "mcn_ext/modalities.py"
    insert(table, "    )\n}\nBY_NAME", row, 8)
    table.write_text(table.read_text().replace('PAIRS = ("AV",', 'PAIRS = ("AV", "DV",'))
    insert(copy / "mcn_ext/model.py", "\n    def freeze(", modules + "\n", 8)
    insert(copy / "mcn_ext/model.py", "    def encode(", method + "\n", 4)
    insert(copy / "mcn_ext/data/clips.py", "        return out\n\n    def look_up(", clips, 8)
    return copy


def add_depth(path):
    """Give a store's videos depth features that tell the caption's word; the last has none."""
    table = np.random.default_rng(7).gamma(0.5, 1, (len(WORDS), 512))
    with h5py.File(path, "a") as file:
        texts = [text.split()[1] for text in file["caption/text"].asstr()]
        rows = np.repeat(table[[WORDS.index(word) for word in texts]], 2, axis=0)
        offset = 2 * file["caption/offset"][:]  # 2 s a caption, 1 row a second
        offset[-1] = offset[-2]
        depth = file.create_group("depth")
        depth["data"] = rows[: offset[-1]].astype(np.float16)
        depth["offset"] = offset
        depth.attrs.update(rate_hz=1.0, model="test", weights_sha256="", tool="test")
    return path


def test_a_fourth_modality_by_the_recipe(project, tmp_path):
    pytest.importorskip("gensim")  # stage 2 trains word vectors on the captions
    train = add_depth(write_store(tmp_path / "train.h5", n_videos=32))
    test = add_depth(write_store(tmp_path / "test.h5", n_videos=24, n_captions=1))
    assert describe([str(train)]) == 0  # a valid store, with nothing done for it
    env = {"PYTHONPATH": str(project)}  # before the installed package

    def script(name, *flags):
        return run(project / name, *flags, "--device", "cpu", cwd=tmp_path, env=env)

    script("train_stage1.py", "--pair", "DV", "--data", train, *SMALL, "--epochs", 20)
    script("train_stage2.py", "--add", "T", "--epochs", 10)
    script("evaluate.py", "--youcook2", test)

    weights = torch.load(tmp_path / "runs/stage2-DV_T/checkpoint.pt", weights_only=True)["model"]
    assert weights["GU_depth.fc.weight"].shape[1] == 512
    assert weights["GU_video.fc.weight"].shape[1] == 12 + 6  # video did not swallow the stream
    metrics = json.loads((tmp_path / "runs/stage2-DV_T/metrics.json").read_text())["youcook2"]
    assert metrics["without"] == {"depth": 1}
    # The fourth comes like the third: a further stage 2.
    said = script("train_stage2.py", "--add", "A", "--init", "runs/stage2-DV_T", "--max_steps", 1)
    assert "stage2-DVT_A: step 1" in said.stdout
    # 24 clips of 8 words: at random, R@10 is 42.
    for direction in ("text->depth", "text->video+depth"):
        assert metrics[direction]["R@10"] > 60
