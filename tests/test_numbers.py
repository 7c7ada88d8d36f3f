"""Every numeric flag of every command refuses, where it is parsed, what cannot work."""

import argparse
import importlib

import pytest

from mcn_ext.train import flags
from tests.conftest import load_script

SCRIPTS = ("train_stage1.py", "train_stage2.py", "evaluate.py")
MODULES = ("prepare.__main__", "study.plan", "report", "store", "evaluation.search")
# Where 0, or also less, means something.
ZERO = {
    "--seed",
    "--seeds",
    "--min_time",
    "--audio_augment",
    "--cluster_weight",
    "--recon_weight",
    "--noise",
    "--video_noise",
    "--audio_noise",
    "--shift",
}
NEGATIVE = {"--margin", "--background"}


class Found(Exception):
    pass


def parsers(monkeypatch):
    """(command, parser) of all commands, and of each KIND of prepare."""

    def found(self, args=None, namespace=None):
        raise Found(self)

    monkeypatch.setattr(flags.Parser, "parse_args", found)
    mains = {name: load_script(name).main for name in SCRIPTS}
    mains |= {name: importlib.import_module(f"mcn_ext.{name}").main for name in MODULES}
    for name, main in mains.items():
        with pytest.raises(Found) as caught:
            main([])
        (parser,) = caught.value.args
        yield name, parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                yield from action.choices.items()


def is_refused(parser, action, text, capsys):
    """Whether parsing ends with status 2 because of this flag, which the message names."""
    words = [text] * (action.nargs if isinstance(action.nargs, int) else 1)
    try:
        parser.parse_known_args([action.option_strings[0], *words])
    except SystemExit as end:
        said = capsys.readouterr().err
        assert end.code == 2 and "Traceback" not in said
        return f"argument {action.option_strings[0]}" in said  # else another one is missing
    return False


def test_numbers_that_cannot_work_are_refused_by_name(monkeypatch, capsys):
    seen = 0
    for command, parser in parsers(monkeypatch):
        for action in parser._actions:
            if getattr(action.type, "__name__", "") not in ("int", "float"):
                continue
            flag = action.option_strings[0]
            allowed = {"0": flag in ZERO | NEGATIVE, "-1": flag in NEGATIVE}
            for text in ("0", "-1", "nan", "inf", "-inf", "1e300", str(10**30), "x", ""):
                refused = is_refused(parser, action, text, capsys)
                if flag == "--workers" and text == "0":
                    continue  # of threads there is at least one, of processes none is a number
                assert refused != allowed.get(text, False), f"{command} {flag} {text!r}"
                seen += 1
    assert seen > 300


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "1e-9", "1e9", "x", ""])
def test_rates_within_words_are_numbers_too(tmp_path, text):
    from mcn_ext.prepare.videos import parse_streams

    with pytest.raises(SystemExit, match=f"--streams 3d={tmp_path}:{text}: expected NAME=DIR:RATE"):
        parse_streams([f"3d={tmp_path}:{text}"])


def test_files_whose_names_begin_with_a_hyphen(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("-abcdefghij.mp4", "--abcdefghi.mp4", "-1.mp4"):
        (tmp_path / name).touch()
        parser = flags.Parser()
        parser.add_argument("paths", nargs="+")
        parser.add_argument("--captions")
        args = parser.parse_args([name, "--captions", name])
        assert args.paths == [f"./{name}"] and args.captions == f"./{name}"
    for name in ("-gone.mp4", "-x"):
        with pytest.raises(SystemExit) as end:
            parser.parse_args([name])
        said = capsys.readouterr().err
        assert end.value.code == 2 and f"{name}: no such flag or file" in said
    with pytest.raises(SystemExit) as end:
        parser.parse_args(["-h"])
    assert end.value.code == 0
    assert parser.parse_args(["-5.5", "--", "-gone.mp4"]).paths == ["-5.5", "-gone.mp4"]
