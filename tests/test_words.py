"""Word vectors without gensim: files are read, and what needs gensim says so at once."""

import sys

import numpy as np
import pytest

from mcn_ext.data.store import Store
from mcn_ext.data.words import WordVectors, vectors_for
from mcn_ext.train import checkpoint
from tests.conftest import SMALL, WORDS, call


@pytest.fixture(autouse=True)
def no_gensim(monkeypatch):
    """gensim as if not installed."""
    for name in ["gensim", *(name for name in sys.modules if name.startswith("gensim."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError):
        import gensim.models  # noqa: F401


@pytest.fixture
def npz(tmp_path):
    path = tmp_path / "vectors.npz"
    WordVectors([*WORDS, "unused"], np.eye(9, 10), "test").save(path)
    return path


def test_vectors_of_an_npz(tmp_path, store_path, npz):
    words = vectors_for(Store(store_path), npz, None)
    assert words.words == sorted(WORDS)
    rows = [WORDS.index(word) for word in words.words]
    np.testing.assert_array_equal(words.vectors, np.eye(9, 10)[rows])
    np.savez(tmp_path / "other.npz", words=["a"], vectors=np.ones((1, 3)))
    npz.write_bytes(npz.read_bytes()[:100])
    for path in (npz, tmp_path / "other.npz"):
        with pytest.raises(SystemExit, match=f"--word2vec {path}: not word vectors"):
            vectors_for(Store(store_path), path, None)


def test_what_needs_gensim_says_so_before_anything_is_done(tmp_path, store_path):
    """No demo data is made, and --no-resume moves no run."""
    (tmp_path / "runs/stage1-VT").mkdir(parents=True)
    own = tmp_path / "own.h5"
    own.write_bytes(store_path.read_bytes())
    call("train_stage1.py", "--pair", "AV", "--data", own, *SMALL, "--max_steps", 1, cwd=tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for command in (
        ("train_stage1.py", "--pair", "VT"),
        ("train_stage1.py", "--pair", "VT", "--data", own, "--no-resume"),
        ("train_stage2.py", "--add", "T"),
    ):
        done = call(*command, "--device", "cpu", cwd=tmp_path, check=False)
        assert done.returncode == 1
        assert done.stderr.startswith("without --word2vec, word vectors are trained"), done.stderr
        assert "pip install gensim, or give --word2vec FILE" in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_a_stage_2_with_an_npz(tmp_path, store_path, eval_path, npz):
    call("train_stage1.py", "--pair", "AV", "--data", store_path, *SMALL, cwd=tmp_path)
    call("train_stage2.py", "--add", "T", "--word2vec", npz, "--device", "cpu", cwd=tmp_path)
    run = tmp_path / "runs/stage2-AV_T"
    assert checkpoint.load(run / "checkpoint.pt")["complete"]
    assert WordVectors.load(run / "words.npz").words == sorted(WORDS)
    assert (
        "text->video+audio"
        in call("evaluate.py", "--youcook2", eval_path, "--device", "cpu", cwd=tmp_path).stdout
    )


def test_words_that_a_run_has_kept_need_no_gensim(tmp_path, store_path, npz, monkeypatch):
    """A run resumes, and stage 2 starts from it, though its --word2vec is a .bin."""
    source = tmp_path / "v.bin"
    source.touch()
    command = (
        "train_stage1.py",
        "--pair",
        "VT",
        "--data",
        store_path,
        *SMALL,
        "--word2vec",
        source,
    )
    with monkeypatch.context() as patch:  # as if gensim had been there
        patch.setattr("mcn_ext.train.inputs.check_gensim", lambda *args: None)
        patch.setattr("mcn_ext.train.inputs.vectors_for", lambda *args: WordVectors.load(npz))
        call(*command, "--max_steps", 1, cwd=tmp_path)
    call(*command, cwd=tmp_path)
    call("train_stage2.py", "--add", "A", "--device", "cpu", "--max_steps", 1, cwd=tmp_path)
    assert checkpoint.load(tmp_path / "runs/stage2-VT_A/checkpoint.pt")["step"] == 1
