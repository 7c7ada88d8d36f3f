"""The flags both training scripts share. Imports nothing heavy: ``--help`` is to answer at once."""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import math
import os
import sys
import time
from pathlib import Path

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
# Flags that are gone, and what to use now.
GONE = {
    "--init_published": "use python -m mcn_ext.prepare published FILE --out RUN; RUN is a run like "
    "any other: train_stage2.py --init RUN, evaluate.py --run RUN",
}

# paper: the published and requested experiment. demo: the same code on 2 cores in two minutes.
PRESETS = {
    "paper": dict(
        batch_size=128,
        n_pair=32,
        lr=1e-4,
        embd_dim=6144,
        recon_dim=1024,
        audio_width=1.0,
        audio_frames=1000,
        min_time=10.0,
        max_words=20,
        cluster_size=256,
        queue_size=20,
        refit_every=20,
        temperature=0.05,
        margin=0.001,
        cluster_weight=1.0,
        recon_weight=50.0,
        audio_augment=0.0,
    ),
    "demo": dict(
        batch_size=16,
        n_pair=8,
        lr=2e-3,
        embd_dim=256,
        recon_dim=128,
        audio_width=0.125,
        audio_frames=300,
        min_time=1.0,
        max_words=20,
        cluster_size=64,
        queue_size=20,
        refit_every=20,
        temperature=0.1,
        margin=0.001,
        cluster_weight=0.3,
        recon_weight=5.0,
        audio_augment=0.0,
    ),
}
EPOCHS = {1: 20, 2: 10}
SIZES = ("embd_dim", "recon_dim", "audio_width")
PAIRS = ("AV", "VT", "AT", "AVT")


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
        for i, arg in enumerate(args):
            if arg.startswith("--"):
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
                if (name := flag.replace("-", "_").replace("__", "--", 1)) in GONE:
                    chosen.error(f"{flag} is gone: {GONE[name]}")
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
    """A script's ``main``, whose last words are said once."""
    try:
        main()
    except SystemExit as error:
        if isinstance(error.code, str):
            _after_the_first()
        raise


def pair(text: str) -> str:
    """Modality letters in any order and case -> the name of the pair ("va" -> "AV")."""
    for name in PAIRS:
        if sorted(name) == sorted(text.upper()):
            return name
    raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(PAIRS)}")


def _checked(kind, accepts, description: str):
    """An argparse type: ``kind`` of the text, if ``accepts`` it."""

    def parse(text: str):
        value = kind(text)
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"{text} must be {description}")
        return value

    parse.__name__ = f"{kind.__name__} {description}"
    return parse


number = _checked(float, math.isfinite, "a number")


def positive(kind):
    return _checked(kind, lambda value: value > 0, "greater than 0")


def not_negative(kind):
    return _checked(kind, lambda value: value >= 0, "0 or more")


def add_training_flags(parser: Parser, stage: int) -> None:
    """All flags of a training run but the pair. What is not given, :func:`complete` fills in."""
    paper, demo = PRESETS["paper"], PRESETS["demo"]
    switch = argparse.BooleanOptionalAction

    def add(name, kind, metavar, text, **kwargs):
        if name in paper:
            text += f" (paper {paper[name]:g}, demo {demo[name]:g})"
        group.add_argument(f"--{name}", type=kind, metavar=metavar, help=text, **kwargs)

    group = parser.add_argument_group("data")
    add("data", Path, "PATH", f"store or folder of shards (default {DATA}, else the demo data)")
    add(
        "word2vec",
        Path,
        "FILE",
        "word vectors: word2vec .bin, text .txt/.vec, gensim .kv, or a "
        f"run's words.npz; the last two without gensim (default {WORD2VEC}; without one, vectors "
        "are trained on the captions)",
    )
    add(
        "preset",
        str,
        None,
        "paper: the published experiment; demo: small, for a CPU (default: "
        "paper when there is data)",
        choices=("paper", "demo"),
    )
    add("n_pair", positive(int), "N", "clips per video and step; lower it for few captions a video")
    add(
        "min_time",
        not_negative(float),
        "S",
        "seconds a clip has at least, grown by neighbouring captions; lower it for short videos",
    )
    add("max_words", positive(int), "N", "words of a clip that are used")
    add(
        "audio_frames",
        positive(int),
        "N",
        "frames of 10 ms of a clip's sound that are used; memory and time grow with it",
    )
    add(
        "audio_augment",
        not_negative(float),
        "X",
        "strength of random changes of voice, pace and "
        "room of training clips; 1 when there are few speakers",
    )
    add(
        "workers",
        not_negative(int),
        "N",
        "processes that read ahead, per rank; raise it when "
        "data_wait in log.jsonl is not near 0 (default: up to 8 with a GPU, 0 on a CPU)",
    )

    if stage == 1:
        group = parser.add_argument_group("model")
        add(
            "embd_dim",
            positive(int),
            "D",
            "width of the joint space; the first to lower when memory is short",
        )
        add("recon_dim", positive(int), "D", "hidden width of the reconstruction heads")
        add(
            "audio_width",
            positive(float),
            "X",
            "width of DAVEnet, 1 as published; 0.25 for small data",
        )

    group = parser.add_argument_group("objective")
    add(
        "temperature",
        positive(float),
        "T",
        "of contrastive and clustering terms; higher when "
        "data is noisy (0.05 to 0.15). 1 with --similarity dot",
    )
    add("margin", float, "M", "taken off the positives' similarity")
    add(
        "similarity",
        str,
        None,
        "cosine, or dot: the published objective, which can diverge (default cosine)",
        choices=("cosine", "dot"),
    )
    add(
        "loss_impl",
        str,
        None,
        "fused: compiled, within MCN_LOSS_BUDGET bytes (default 2 GiB); "
        "reference: plain PyTorch, to compare (default fused)",
        choices=("fused", "reference"),
        default="fused",
    )
    group.add_argument(
        "--joint_pairs",
        action=switch,
        default=None,
        help="with three modalities, "
        "also align each with the mean of the other two; try it when one is noisy, "
        "or when two are searched together (default off, as published)",
    )
    if stage == 2:
        add(
            "clean_first",
            not_negative(float),
            "SHARE",
            "leave out the clips whose first pair "
            "agrees least: half of each batch at the start, none after this share of the run; try "
            "0.5 when data is noisy (default 0: off)",
            default=0.0,
        )
    add("cluster_weight", not_negative(float), "W", "weight of the clustering loss, 0: without")
    add("recon_weight", not_negative(float), "W", "weight of the reconstruction loss, 0: without")
    add(
        "cluster_size",
        positive(int),
        "K",
        "number of centroids; the queue must hold many times as many clips",
    )
    add("queue_size", positive(int), "STEPS", "steps whose features are clustered")
    add("refit_every", positive(int), "STEPS", "steps between two k-means fits")

    group = parser.add_argument_group("optimisation")
    add(
        "batch_size",
        positive(int),
        "N",
        "videos per step over ALL ranks; more negatives help, up to what memory holds",
    )
    add(
        "micro_batch",
        not_negative(int),
        "N",
        "clips per rank that are encoded at a time: when "
        "memory is short, at the price of running the encoders' forward twice; same gradients, "
        "BatchNorm of the whole batch (default 0: all at once)",
        default=0,
    )
    add(
        "epochs",
        positive(int),
        "N",
        f"passes over the videos (default {EPOCHS[stage]})",
        default=EPOCHS[stage],
    )
    add("lr", positive(float), "LR", "Adam's learning rate at its peak; try 1e-3 for small data")
    add(
        "warmup_steps",
        not_negative(int),
        "N",
        "steps of linear warm-up before the cosine decay "
        "(default: a tenth of all steps, at most 1000)",
    )
    add(
        "precision",
        str,
        None,
        "of the encoders; losses and clustering are always fp32 (default: "
        "bf16 on GPUs that have it, else fp32)",
        choices=("fp32", "bf16", "fp16"),
    )
    group.add_argument(
        "--dry_run",
        action="store_true",
        help="take a few steps, keep nothing, and "
        "say what the run will cost: time, memory, disk; before a long one",
    )
    add("max_steps", positive(int), "N", "stop after so many steps; the schedule stays as it is")
    add(
        "max_bad_steps",
        positive(int),
        "N",
        "stop after so many steps in a row whose loss or "
        "gradient is not finite; each is skipped and explained (default 10)",
        default=10,
    )
    add(
        "grad_outliers",
        str,
        None,
        "what to do with a gradient whose norm is over --grad_factor "
        "times the median of the last 100 steps: clip it to that, or skip the step; try clip when "
        "the loss has spikes (default off)",
        choices=("off", "clip", "skip"),
        default="off",
    )
    add("grad_factor", positive(float), "X", "see --grad_outliers (default 10)", default=10.0)

    group = parser.add_argument_group("run")
    add("out", Path, "DIR", "run folder (default runs/stage..., by pair and data)")
    group.add_argument(
        "--resume",
        action=switch,
        default=True,
        help="go on from the run folder's "
        "checkpoint if there is one; --no-resume keeps the old folder as <name>.1 "
        "and starts anew",
    )
    add("seed", not_negative(int), "N", "of weights, sampling and clustering (default 0)")
    add("device", str, "DEV", "auto, cpu, cuda or cuda:N (default auto)", default="auto")
    add(
        "save_every",
        positive(int),
        "STEPS",
        "steps between checkpoints within an epoch (default 1000); a kill costs at most these",
        default=1000,
    )
    group.add_argument(
        "--keep_epochs",
        action=switch,
        default=True,
        help="keep each epoch's weights, epoch-NN.pt; --no-keep_epochs when disk is short",
    )
    add(
        "log_every",
        positive(int),
        "STEPS",
        "steps between lines of log.jsonl (default 10); each waits for the GPU",
        default=10,
    )
    add(
        "hang_minutes",
        positive(float),
        "MIN",
        "of several ranks: when a step takes longer, name "
        "the rank and the step it hangs at, and end the job (default 10)",
        default=10.0,
    )
    group.add_argument(
        "--detect",
        nargs="?",
        type=Path,
        const=Path(),
        metavar="FILE",
        help="train nothing: replay a bad step kept in the run folder (default: its "
        "last) and print the first module and tensor that is not finite",
    )
    group.add_argument(
        "--tensorboard",
        action=switch,
        default=False,
        help="also write TensorBoard events to the run folder (pip install tensorboard)",
    )


# What stage 2 takes from the run it starts from unless it is given: the data and all that must not
# differ between stages.
INHERITED = (
    "data",
    "word2vec",
    "n_pair",
    "min_time",
    "max_words",
    "audio_frames",
    "audio_augment",
    "embd_dim",
    "recon_dim",
    "audio_width",
    "temperature",
    "margin",
    "similarity",
    "joint_pairs",
    "cluster_weight",
    "recon_weight",
    "cluster_size",
    "queue_size",
    "refit_every",
    "batch_size",
    "lr",
    "precision",
    "seed",
    "preset",
)


def complete(args: argparse.Namespace, inherited: dict | None = None) -> argparse.Namespace:
    """Fill in what was not given: from ``inherited``, then from the preset the data asks for.
    SystemExit for what cannot work, before anything is read."""
    if args.out is not None and args.out.exists() and not args.out.is_dir():
        raise SystemExit(f"--out {args.out}: a file, not a folder; give another")
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise SystemExit(
            "--tensorboard needs: pip install tensorboard (or pip install -e '.[tensorboard]')"
        )
    inherited = dict(inherited or {})
    if args.similarity not in (None, inherited.get("similarity")):
        inherited.pop("temperature", None)  # the other similarity has another scale
    for name in INHERITED:
        if getattr(args, name, None) is None:
            value = inherited.get(name)
            setattr(args, name, Path(value) if value and name in ("data", "word2vec") else value)
    if args.data is None:
        found = next((path for path in (DATA, DATA.with_suffix("")) if path.exists()), None)
        if args.preset == "paper" and found is None:
            raise SystemExit(
                f"--preset paper: no data at {DATA}; prepare it (python -m "
                "mcn_ext.prepare howto100m --help) or give --data"
            )
        args.data = DEMO / "train.h5" if found is None or args.preset == "demo" else found
    args.demo = args.data.resolve() == (DEMO / "train.h5").resolve()
    if not args.demo and not args.data.exists():
        raise SystemExit(
            f"--data {args.data}: no such store; prepare one with python -m "
            "mcn_ext.prepare, or check the path"
        )
    args.preset = args.preset or ("demo" if args.demo else "paper")
    preset = dict(PRESETS[args.preset])
    if args.similarity == "dot":  # the published objective: the dot product at temperature 1
        preset["temperature"] = 1.0
    for name, value in preset.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.similarity = args.similarity or "cosine"
    args.resume = args.resume or args.detect is not None  # the kept step lies in the run folder
    args.seed, args.joint_pairs = args.seed or 0, bool(args.joint_pairs)
    has_words = "T" in inherited.get("pair", "")  # stage 1's text encoder knows its own vectors
    if args.word2vec is None and WORD2VEC.exists() and not args.demo and not has_words:
        args.word2vec = WORD2VEC
    if args.word2vec is not None and not args.word2vec.is_file():
        raise SystemExit(
            f"--word2vec {args.word2vec}: no such file; leave it out to train vectors "
            "on the captions"
        )
    return args


def as_dict(args: argparse.Namespace) -> dict:
    """Plain values, for args.json and checkpoints."""
    return {
        key: str(value) if isinstance(value, Path) else value
        for key, value in sorted(vars(args).items())
    }
