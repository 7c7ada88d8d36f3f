"""Parsing flags, and what they default to. Imports nothing heavy: ``--help`` answers at once."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shlex
import sys
import time
from pathlib import Path

from mcn_ext.console import printable
from mcn_ext.modalities import MODALITIES, PAIRS

DATA = Path("data/howto100m.h5")
# Evaluation stores where the scripts look, and what makes them.
STORES = {
    name: Path(f"data/{name}.h5") for name in ("youcook2", "msrvtt", "crosstask", "miningyoutube")
}
STORES["moments"] = Path("data/videos.h5")
PREPARE = {
    "youcook2": "youcook2 youcook_val_audio.pkl",
    "msrvtt": "msrvtt FILE.pkl",
    **{
        name: f"{name} --list CSV --features DIR --annotations DIR --steps FILE"
        for name in ("crosstask", "miningyoutube")
    },
    "moments": "videos DIR --captions FILE",
}
WORD2VEC, DEMO = Path("data/word2vec.bin"), Path("data/demo")

LOSSES = ("softmax", "milnce", "dcl", "sigmoid")
# Flags of one loss: {flag: (the loss, its default)}; None with the others.
OF_LOSS = {"n_candidates": ("milnce", 4)}

RATE = 1e-3, 1e5  # rows a second, of a stream
NOISE = 0, 1000  # of demo data: far beyond hearing and seeing anything; float16 holds what it makes
LARGEST = 2**31 - 1  # of a number: no count, rate, size or time needs more; 32 bits hold it

# Flags of the first edition, and what to use now.
GONE = {
    "--init_published": "python -m mcn_ext.prepare published FILE --out RUN makes a run of it, for "
    "train_stage2.py --init RUN and evaluate.py --run RUN",
    "--micro_batch": "use --checkpoint_activations when memory is short",
    "--dry_run": "use --max_steps 20; log.jsonl then has the time, the waiting and the memory",
    "--hang_minutes": "a rank that waits 10 minutes for the others ends the job",
    "--max_bad_steps": "a run stops after 10 bad steps in a row",
    "--grad_outliers": "use --clip_grad_norm",
    "--grad_factor": "use --clip_grad_norm",
    "--refit_every": "k-means runs every --queue_size steps",
    "--warmup_steps": "a tenth of all steps, at most 1000; see learning_rate() in the script",
    "--max_words": "20 words of a caption are used",
    "--loss_impl": "the environment variable MCN_LOSS=reference chooses the plain PyTorch losses",
    "--clean_first": "it is no longer supported",
    "--joint_pairs": "it is no longer supported",
    "--tensorboard": "log.jsonl has all numbers, and curves.png shows them",
    "--detect": "use python -m mcn_ext.train.replay FILE",
    "--keep_epochs": "each epoch's weights are kept in epoch-NN.pt; remove what you do not need",
}


# Flags of one script that people try with another.
ELSEWHERE = {
    **dict.fromkeys(
        ("--pair", "--embd_dim", "--recon_dim", "--audio_width"),
        "a flag of train_stage1.py; later scripts take it from the run they start from",
    ),
    **dict.fromkeys(
        ("--add", "--init", "--stage1_encoders"), "a flag of train_stage2.py, which adds a modality"
    ),
    "--epochs": "a flag of the training scripts",
    **dict.fromkeys(("--language", "--media"), "a flag of python -m mcn_ext.report, for studies"),
}


def _hook(kind, value, trace) -> None:
    """Ctrl-C is no error: one line, where Python would print where it happened to be."""
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted; what was written before is untouched", file=sys.stderr)
    else:
        sys.__excepthook__(kind, value, trace)


class Parser(argparse.ArgumentParser):
    """argparse whose long options may be written with underscores or hyphens.

    ``also``: flags of the command that another parser reads, for "did you mean".
    """

    also: tuple[str, ...] = ()

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        known = {option.replace("-", "_"): option for option in self._option_string_actions}
        args = list(sys.argv[1:] if args is None else args)
        end = args.index("--") if "--" in args else len(args)
        for i, arg in enumerate(args[:end]):
            if arg in self._option_string_actions:
                continue
            if arg.startswith("-") and os.path.lexists(arg):
                args[i] = f"./{arg}"  # a file: some of YouTube's ids begin so
            elif re.match("-[^-]", arg) and not _is_number(arg):
                self.error(f"{arg}: no such flag or file; write a new file as ./{arg}")
            elif arg.startswith("--"):
                name, equals, value = arg.partition("=")
                args[i] = known.get(name.replace("-", "_"), name) + equals + value
        return super().parse_known_args(args, namespace)

    def parse_args(self, args=None, namespace=None):
        sys.excepthook = _hook
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            words = sys.argv[1:] if args is None else args
            chosen = next(
                (
                    action.choices[word]
                    for action in self._actions
                    if isinstance(action, argparse._SubParsersAction)
                    for word in words
                    if word in action.choices
                ),
                self,
            )
            flags = [word.partition("=")[0] for word in unknown if word.startswith("-")]
            for flag in flags:
                name = flag.replace("-", "_").replace("__", "--", 1).replace("--no_", "--")
                if name in GONE:
                    chosen.error(f"{flag} is gone: {GONE[name]}")
                if name in ELSEWHERE:
                    chosen.error(f"{flag}: {ELSEWHERE[name]}")
            known = [*chosen._option_string_actions, *self.also]
            near = {flag: difflib.get_close_matches(flag, known, 1, 0.7) for flag in flags}
            chosen.error(
                "; ".join(
                    [
                        f"{flag}: no such flag" + (f", did you mean {match[0]}?" if match else "")
                        for flag, match in near.items()
                    ]
                    or [f"{' '.join(unknown)}: not a flag's value; flags begin with --"]
                )
            )
        return found

    def error(self, message: str):
        """Exit status 2 and one line: dozens of flags would push the reason off the screen."""
        _after_the_first()
        self.exit(2, f"{self.prog}: {message} (--help lists all flags)\n")


def _after_the_first() -> None:
    """What all ranks of a node have to say, the first one does, and torchrun or srun ends the
    others meanwhile; what one alone has to say comes a little later."""
    if int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0))):
        time.sleep(3)


def run(main) -> None:
    """Run a command's ``main`` and exit; ranks say an error once, and no text of the data ends
    the command (on an ASCII console) or reaches the terminal as an escape sequence."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")
    try:
        try:
            sys.exit(main())
        except BrokenPipeError:  # of `| head`: what it wanted to read is written
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(1) from None
        except Exception as error:
            from mcn_ext.data.store_file import StoreError  # it loads h5py: --help does not wait

            if "out of shared memory" in str(error) or "DataLoader timed out" in str(error):
                raise SystemExit(
                    f"{error}. Its workers need shared memory (/dev/shm): lower --workers, or, in "
                    "a container, raise docker run --shm-size. To resume, run the same command"
                ) from None
            if not isinstance(error, StoreError):
                raise
            raise SystemExit(str(error)) from None
    except SystemExit as error:
        if isinstance(error.code, str):
            _after_the_first()
            error.code = printable(error.code)
        raise


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name a trained run, and say how it embeds."""
    add = parser.add_argument
    add(
        "--run",
        type=Path,
        metavar="DIR",
        help="run folder (default: the newest, stage 2 before stage 1)",
    )
    add(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="a checkpoint of it, such as RUN/epoch-05.pt (default: RUN/checkpoint.pt)",
    )
    add(
        "--batch_size",
        type=positive(int),
        default=64,
        metavar="N",
        help="clips embedded at a time (default 64)",
    )
    add(
        "--encoder",
        metavar="NAME",
        help="of --text NAME's runs: where the sentence encoder is now (default: as the training "
        "store says), a folder or a name of sentence-transformers",
    )
    add("--device", default="auto", metavar="DEV", help="auto, cpu, cuda or cuda:N (default auto)")


def pair(text: str) -> str:
    """Modality letters in any order and case -> the name of the pair ("va" -> "AV")."""
    for name in PAIRS:
        if sorted(name) == sorted(text.upper()):
            return name
    raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(PAIRS)}")


def _is_number(text: str) -> bool:
    try:
        return bool(float(text)) or True
    except ValueError:
        return False


def between(kind, low: float, high: float = LARGEST, more: bool = False):
    """An argparse type: a number from ``low`` (``more``: greater than it) to ``high``."""

    def parse(text: str):
        value = kind(text)
        if not low <= value <= high or (more and value == low):  # NaN is nowhere between
            least = f"greater than {low}" if more else f"{low} or more"
            raise argparse.ArgumentTypeError(f"{text} must be {least}, at most {high}")
        return value

    parse.__name__ = kind.__name__
    return parse


number = between(float, -LARGEST)


def positive(kind):
    return between(kind, 0, more=True)


def not_negative(kind):
    return between(kind, 0)


# Of windows in a video: smaller ones would fill the memory, and show one row many times.
window_seconds = between(float, 0.1, 1e5)
window_stride = between(float, 0.01, 100)


def streams(text: str) -> str:
    """davenet, or names of streams with commas between."""
    names = [name.strip() for name in text.split(",")]
    if not all(names) or len(set(names)) < len(names) or ("davenet" in names and names[1:]):
        raise argparse.ArgumentTypeError(f"{text!r}: davenet, or names like beats,clap")
    return ",".join(names)


def letter(text: str) -> str:
    """The letter of a modality, in any case."""
    if text.upper() not in MODALITIES:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(MODALITIES)}")
    return text.upper()


def real_data() -> Path | None:
    """The training data that is used where --data is not given; None where there is none."""
    return next((path for path in (DATA, DATA.with_suffix("")) if path.exists()), None)


def find_data(data: Path | None, preset: str | None) -> tuple[Path, str, bool]:
    """(training data, preset, whether it is the demo data) for what --data and --preset say."""
    if data == Path("demo"):
        data = DEMO / "train.h5"
    data = data or real_data()
    if data is None and preset not in (None, "demo"):
        raise SystemExit(
            f"--preset {preset}: no data at {DATA.absolute()}; prepare it (python -m "
            "mcn_ext.prepare howto100m --help) or give --data"
        )
    data = data or DEMO / "train.h5"
    demo = data.resolve() == (DEMO / "train.h5").resolve()
    return data, preset or ("demo" if demo else "paper"), demo


def check(args: argparse.Namespace, own_words: bool = True) -> None:
    """SystemExit for what cannot work, before anything is read; the defaults of ``OF_LOSS``, and
    that of --word2vec, unless words are another run's (``own_words`` False)."""
    for flag, (loss, default) in OF_LOSS.items():
        if args.loss == loss:
            setattr(args, flag, getattr(args, flag) or default)
        elif getattr(args, flag) is not None:
            raise SystemExit(f"--{flag}: of --loss {loss}, not of {args.loss}; leave it out")
    if args.learn_temperature and args.temperature < 0.01:
        raise SystemExit(
            f"--temperature {args.temperature} with --learn_temperature: a learnt one is at least "
            "0.01; start there or above"
        )
    if args.out is not None and not args.out.name:
        raise SystemExit(f"--out {args.out}: give the folder a name")
    if args.out is not None and args.out.exists() and not args.out.is_dir():
        raise SystemExit(f"--out {args.out}: a file, not a folder; give another")
    if not args.demo and not args.data.exists():
        raise SystemExit(
            f"--data {args.data}: no such store; prepare one with python -m mcn_ext.prepare, or "
            "check the path"
        )
    if args.audio != "davenet" and args.audio_augment:
        raise SystemExit(
            f"--audio_augment {args.audio_augment}: changes spectrograms, and --audio {args.audio} "
            "reads none; leave it out"
        )
    if args.text != "words" and args.word2vec is not None:
        raise SystemExit(f"--word2vec {args.word2vec}: --text {args.text} takes no word vectors")
    if not own_words or args.text != "words":
        return
    if args.word2vec is None and WORD2VEC.exists() and not args.demo:
        args.word2vec = WORD2VEC
    if args.word2vec is not None and not args.word2vec.is_file():
        raise SystemExit(
            f"--word2vec {args.word2vec}: no such file; leave it out to train vectors on the "
            "captions"
        )


def next_command(folder: Path, modalities: str, named: bool) -> str:
    """What to run after a stage; ``named``: with its folder, which is not the default one."""
    missing = next((m for m in MODALITIES if m not in modalities), None)
    script = f"train_stage2.py --add {missing}" if missing else "evaluate.py --youcook2"
    named = named or (folder.name.endswith("-demo") and real_data() is not None)
    where = f" --{'init' if missing else 'run'} {shlex.quote(str(folder))}" if named else ""
    return f"Next: python {script}{where}"


def as_dict(args: argparse.Namespace) -> dict:
    """Plain values, for args.json and checkpoints."""
    return {
        key: str(value) if isinstance(value, Path) else value
        for key, value in sorted(vars(args).items())
    }
