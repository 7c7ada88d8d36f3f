"""The command line: what users type."""

import ast
import time

import pytest

from mcn_ext.train import flags
from tests.conftest import ROOT, run

SCRIPTS = ("train_stage1.py", "train_stage2.py", "evaluate.py")


def parse(*words, stage=1):
    parser = flags.Parser()
    flags.add_training_flags(parser, stage)
    return parser.parse_args([str(w) for w in words])


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_before_torch_is_loaded(script, tmp_path):
    begin = time.perf_counter()
    done = run(
        "-X", "importtime", ROOT / script, "--help", cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}
    )
    assert (
        " torch" not in done.stderr and " h5py" not in done.stderr and " numpy" not in done.stderr
    )
    # How fast it is, is measured elsewhere.
    assert "usage:" in done.stdout and time.perf_counter() - begin < 30


def test_hyphens_and_underscores_are_the_same():
    for words in (
        ("--batch-size", 4, "--max_words=3", "--no-resume"),
        ("--batch_size=4", "--max-words", 3, "--no_resume"),
    ):
        args = parse(*words)
        assert (args.batch_size, args.max_words, args.resume) == (4, 3, False)


def test_pair_names():
    assert [flags.pair(p) for p in ("va", "TV", "AT", "tav")] == ["AV", "VT", "AT", "AVT"]
    with pytest.raises(Exception, match="not one of"):
        flags.pair("AX")


def test_defaults_are_the_published_experiment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/howto100m.h5").touch()
    (tmp_path / "data/word2vec.bin").touch()
    args = flags.complete(parse())
    assert (args.preset, str(args.data), str(args.word2vec)) == (
        "paper",
        "data/howto100m.h5",
        "data/word2vec.bin",
    )
    assert (args.batch_size, args.n_pair, args.lr, args.epochs) == (128, 32, 1e-4, 20)
    assert (args.embd_dim, args.cluster_size, args.queue_size, args.min_time, args.max_words) == (
        6144,
        256,
        20,
        10,
        20,
    )
    assert (args.audio_frames, args.audio_width, args.temperature, args.similarity) == (
        1000,
        1.0,
        0.05,
        "cosine",
    )
    assert parse(stage=2).epochs == 10
    assert flags.complete(parse("--similarity", "dot")).temperature == 1.0


def test_without_data_it_is_the_demo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = flags.complete(parse())
    assert (
        args.demo
        and args.preset == "demo"
        and args.batch_size == flags.PRESETS["demo"]["batch_size"]
    )
    with pytest.raises(SystemExit, match="--preset paper: no data at data/howto100m.h5"):
        flags.complete(parse("--preset", "paper"))
    with pytest.raises(SystemExit, match="--data gone.h5: no such store"):
        flags.complete(parse("--data", "gone.h5"))
    (tmp_path / "x.h5").touch()
    with pytest.raises(SystemExit, match="--word2vec gone.bin: no such file"):
        flags.complete(parse("--data", "x.h5", "--word2vec", "gone.bin"))


def test_stage_2_takes_over_what_must_not_differ(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.h5").touch()
    first = flags.as_dict(
        flags.complete(parse("--data", "x.h5", "--temperature", 0.2, "--min_time", 0.5))
    )
    args = flags.complete(parse("--temperature", 0.3, stage=2), inherited=first)
    assert (str(args.data), args.min_time, args.temperature, args.epochs, args.preset) == (
        "x.h5",
        0.5,
        0.3,
        10,
        "paper",
    )


@pytest.mark.parametrize(
    "words",
    [
        ("--batch_size", 0),
        ("--lr", -1),
        ("--epochs", "x"),
        ("--recon_weight", -0.5),
        ("--temperature", "nan"),
        ("--unknown_flag", 1),
    ],
)
def test_bad_values_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        parse(*words)
    assert words[0] in capsys.readouterr().err


def test_nothing_unpickles_or_evaluates_what_it_reads():
    for module in (ROOT / "mcn_ext").rglob("*.py"):
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "pickle.load", "pickle.loads"), module


@pytest.mark.parametrize(
    "words, message",
    [
        (["--batch-sise", "4"], "--batch-sise: no such flag, did you mean --batch_size?"),
        (["--qqq=1"], "--qqq: no such flag ("),
        (["4"], "4: not a flag's value"),
    ],
)
def test_a_misspelt_flag_is_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(*words)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and message in said and said.count("\n") == 1
