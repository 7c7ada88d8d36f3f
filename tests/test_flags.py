"""The command line: what users type."""

import ast
import time
from pathlib import Path

import pytest

from mcn_ext.train import flags
from tests.conftest import ROOT, load_script, run

SCRIPTS = ("train_stage1.py", "train_stage2.py", "evaluate.py")
STAGE1, STAGE2 = load_script("train_stage1.py"), load_script("train_stage2.py")


def parse(*words):
    return STAGE1.get_args(["--pair", "AV", *map(str, words)])


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_before_torch_is_loaded(script, tmp_path):
    begin = time.perf_counter()
    env = {"PYTHONPATH": str(ROOT)}
    done = run("-X", "importtime", ROOT / script, "--help", cwd=tmp_path, env=env)
    assert not any(name in done.stderr for name in (" torch", " h5py", " numpy"))
    # How fast it is, is measured elsewhere.
    assert "usage:" in done.stdout and time.perf_counter() - begin < 30


def test_a_stage_has_at_most_38_flags():
    for stage in (STAGE1, STAGE2):
        assert len(stage.get_parser()._actions) - 1 <= 38  # --help is argparse's


def test_hyphens_and_underscores_are_the_same():
    for words in (
        ("--batch-size", 4, "--n_pair=3", "--no-resume"),
        ("--batch_size=4", "--n-pair", 3, "--no_resume"),
    ):
        args = parse(*words)
        assert (args.batch_size, args.n_pair, args.resume) == (4, 3, False)


def test_pair_names():
    assert [flags.pair(p) for p in ("va", "TV", "AT", "tav")] == ["AV", "VT", "AT", "AVT"]
    with pytest.raises(Exception, match="not one of"):
        flags.pair("AX")
    with pytest.raises(Exception, match="not one of"):
        flags.letter("x")


def test_defaults_are_the_published_experiment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("howto100m.h5", "word2vec.bin"):
        (tmp_path / "data" / name).touch()
    args = parse()
    assert (args.preset, args.data, args.word2vec) == (
        "paper",
        Path("data/howto100m.h5"),
        Path("data/word2vec.bin"),
    )
    assert (args.batch_size, args.n_pair, args.lr, args.epochs) == (128, 32, 1e-4, 20)
    assert (args.embd_dim, args.cluster_size, args.queue_size, args.min_time) == (6144, 256, 20, 10)
    assert (args.audio_frames, args.audio_width, args.recon_weight) == (1000, 1.0, 50)
    assert (args.temperature, args.similarity) == (0.05, "cosine")
    assert parse("--similarity", "dot").temperature == 1.0
    assert parse("--similarity", "dot", "--temperature", 0.5).temperature == 0.5
    assert STAGE2.get_args(["--add", "T"]).epochs == 10


def test_without_data_it_is_the_demo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = parse()
    assert args.demo and args.preset == "demo"
    demo = STAGE1.PRESETS["demo"]
    assert args.batch_size == demo["batch_size"] and args.lr == demo["lr"]
    assert parse("--lr", 0.5).lr == 0.5
    (tmp_path / "x.h5").touch()
    for words, message in (
        (("--preset", "paper"), "--preset paper: no data at .*/data/howto100m.h5"),
        (("--data", "gone.h5"), "--data gone.h5: no such store"),
        (("--data", "x.h5", "--word2vec", "gone.bin"), "--word2vec gone.bin: no such file"),
        (("--data", "x.h5", "--out", "x.h5"), "--out x.h5: a file, not a folder"),
        (("--learn_temperature", "--temperature", 0.005), "a learnt one is at least 0.01"),
        (("--n_candidates", 4), "--n_candidates: of --loss milnce, not of softmax; leave it out"),
    ):
        with pytest.raises(SystemExit, match=message):
            parse(*words)


def test_stage_2_takes_over_what_must_not_differ(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.h5").touch()
    first = flags.as_dict(parse("--data", "x.h5", "--temperature", 0.2, "--min_time", 0.5))
    first["modalities"] = "AV"
    args = STAGE2.get_args(["--add", "T", "--temperature", "0.3"], first)
    assert (args.data, args.min_time, args.temperature) == (Path("x.h5"), 0.5, 0.3)
    assert (args.epochs, args.preset, args.demo) == (10, "paper", False)
    # A flag of the loss goes with it.
    first = flags.as_dict(parse("--data", "x.h5", "--loss", "milnce")) | {"modalities": "AV"}
    losses = [STAGE2.get_args(["--add", "T", *more], first) for more in ([], ["--loss", "dcl"])]
    assert [(a.loss, a.n_candidates) for a in losses] == [("milnce", 4), ("dcl", None)]
    # A text encoder knows the vectors that it learnt with, whatever lies there now.
    (tmp_path / "data").mkdir()
    (tmp_path / "data/word2vec.bin").touch()
    for pair, words in (("AT", None), ("AV", Path("data/word2vec.bin"))):
        assert STAGE2.get_args(["--add", "V"], first | {"modalities": pair}).word2vec == words
    # Another similarity has another scale.
    assert STAGE2.get_args(["--add", "T", "--similarity", "dot"], first).temperature == 1.0


def shared_blocks(name):
    """The blocks between rulers of a stage's script, by title."""
    parts = (ROOT / name).read_text().split("    # ----")[1:]
    return {part.lstrip("-").splitlines()[0].strip(): part for part in parts}


def test_what_both_stages_do_is_written_the_same():
    first, second = shared_blocks("train_stage1.py"), shared_blocks("train_stage2.py")
    for title in (
        "processes and precision",
        "optimiser and schedule",
        "train",
    ):
        assert first[title] == second[title], title


@pytest.mark.parametrize(
    "words",
    [
        ("--batch_size", 0),
        ("--lr", -1),
        ("--epochs", "x"),
        ("--recon_weight", -0.5),
        ("--temperature", "nan"),
        ("--unknown_flag", 1),
        ("--loss", "mse"),
        ("--n_candidates", 0),
    ],
)
def test_bad_values_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        parse(*words)
    assert words[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        (["--batch-sise", "4"], "--batch-sise: no such flag, did you mean --batch_size?"),
        (["--qqq=1"], "--qqq: no such flag ("),
        (["4"], "4: not a flag's value"),
        (["--micro-batch", "8"], "--micro-batch is gone: use --checkpoint_activations"),
        (["--no-keep_epochs"], "--no-keep_epochs is gone: each epoch's weights are kept"),
    ],
)
def test_a_misspelt_flag_is_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(*words)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and message in said and said.count("\n") == 1


def test_nothing_unpickles_or_evaluates_what_it_reads():
    for module in (ROOT / "mcn_ext").rglob("*.py"):
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "pickle.load", "pickle.loads"), module


def test_a_preset_is_sizes_and_the_demo_data_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/howto100m.h5").touch()
    args = parse("--preset", "demo")
    assert (args.data, args.demo) == (Path("data/howto100m.h5"), False)
    assert args.embd_dim == STAGE1.PRESETS["demo"]["embd_dim"]
    args = parse("--data", "demo")
    assert (args.data, args.demo, args.preset) == (flags.DEMO / "train.h5", True, "demo")


@pytest.mark.parametrize(
    "script, flag, message",
    [
        ("train_stage2.py", "--embd_dim", "a flag of train_stage1.py"),
        ("evaluate.py", "--pair", "a flag of train_stage1.py"),
        ("train_stage1.py", "--stage1-encoders", "a flag of train_stage2.py"),
    ],
)
def test_a_flag_of_another_script_is_said(script, flag, message, capsys):
    parse = {"evaluate.py": "parse"}.get(script, "get_args")
    required = {"train_stage1.py": ["--pair", "AV"], "train_stage2.py": ["--add", "T"]}
    with pytest.raises(SystemExit):
        getattr(load_script(script), parse)([*required.get(script, ["--youcook2"]), flag, "x"])
    assert f"{flag}: {message}" in capsys.readouterr().err
