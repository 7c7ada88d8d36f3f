"""The flags both training scripts share. Imports nothing heavy: ``--help`` answers before torch is
loaded."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

DATA, YOUCOOK2, WORD2VEC, DEMO = (Path("data/howto100m.h5"), Path("data/youcook2.h5"),
                                  Path("data/word2vec.bin"), Path("data/demo"))

# Defaults by preset. paper: the published and requested experiment. demo: the same code on 2 cores
# in a minute.
PRESETS = {
    "paper": dict(batch_size=128, n_pair=32, lr=1e-4, embd_dim=6144, recon_dim=1024,
                  audio_width=1.0, audio_frames=1000, min_time=10.0, max_words=20, cluster_size=256,
                  queue_size=20, refit_every=20, temperature=0.05, cluster_weight=1.0,
                  recon_weight=50.0, audio_augment=0.0),
    "demo": dict(batch_size=16, n_pair=8, lr=1e-3, embd_dim=256, recon_dim=128, audio_width=0.25,
                 audio_frames=400, min_time=1.0, max_words=20, cluster_size=64, queue_size=20,
                 refit_every=20, temperature=0.07, cluster_weight=0.1, recon_weight=1.0,
                 audio_augment=0.0)
}
EPOCHS = {1: 20, 2: 10}
PAIRS = ("AV", "VT", "AT", "AVT")


class Parser(argparse.ArgumentParser):
    """argparse whose long options may be written with underscores or hyphens."""
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


def pair(text: str) -> str:
    """Modality letters in any order and case -> the name of the pair ("va" -> "AV")."""
    for name in PAIRS:
        if sorted(name) == sorted(text.upper()):
            return name
    raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(PAIRS)}")


def positive(kind):
    def parse(text: str):
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} must be greater than 0")
        return value

    parse.__name__ = f"positive {kind.__name__}"
    return parse


def not_negative(text: str) -> float:
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text} must be 0 or more")
    return value


not_negative.__name__ = "number >= 0"


def add_training_flags(parser: Parser, stage: int) -> None:
    """Every flag of a training run but the pair. Values left out come from the preset (or, in stage
    2, the init run)."""
    paper, demo, integer, number = PRESETS["paper"], PRESETS["demo"], positive(int), positive(float)

    def add(group, name, text, **kwargs):
        if name in paper:
            text += f" (paper {paper[name]:g}, demo {demo[name]:g})"
        group.add_argument(f"--{name}", help=text, **kwargs)

    g = parser.add_argument_group("data")
    add(g, "data", f"store or folder of shards to train on (default {DATA}, else the demo data)",
        type=Path, metavar="PATH")
    add(
        g, "word2vec",
        f"word vectors: word2vec .bin, gensim .kv, or text .txt/.vec (default {WORD2VEC}; without "
        f"one, "
        "vectors are trained on the captions)", type=Path, metavar="FILE")
    add(
        g, "preset",
        "paper: the published experiment; demo: small, for a CPU (default: paper when there is "
        "data)",
        choices=("paper", "demo"))
    add(g, "n_pair", "clips per video and step; lower it when videos have few captions",
        type=integer, metavar="N")
    add(g, "min_time",
        "seconds a clip has at least, grown by neighbouring captions; lower it for short videos",
        type=not_negative, metavar="S")
    add(g, "max_words", "words of a clip that are used", type=integer, metavar="N")
    add(g, "audio_frames",
        "frames of 10 ms of a clip's sound that are used; memory and time grow with it",
        type=integer, metavar="N")
    add(
        g, "audio_augment",
        "strength of random changes of voice, pace and room of training clips; 1 when there are "
        "few "
        "speakers", type=not_negative, metavar="X")
    add(
        g, "workers",
        "processes that read ahead, per rank; raise it when data_wait in log.jsonl is not near 0 "
        "(default: up to 8 with a GPU, 0 on a CPU)", type=int, metavar="N")

    g = parser.add_argument_group("model")
    if stage == 1:
        add(g, "embd_dim", "width of the joint space; the first to lower when memory is short",
            type=integer, metavar="D")
        add(g, "recon_dim", "hidden width of the reconstruction heads", type=integer, metavar="D")
        add(g, "audio_width", "width of DAVEnet, 1.0 as published; 0.25 for small data",
            type=number, metavar="X")

    g = parser.add_argument_group("objective")
    add(
        g, "temperature",
        "of contrastive and clustering terms; higher when data is noisy (0.05 to 0.1). 1 with "
        "--similarity dot", type=number, metavar="T")
    g.add_argument("--margin", type=float, default=0.001, metavar="M",
                   help="taken off the positives' similarity (default 0.001)")
    g.add_argument(
        "--similarity", choices=("cosine", "dot"),
        help="cosine, or dot: the published objective, which can diverge (default cosine)")
    add(g, "cluster_weight", "weight of the clustering loss, 0 switches it off", type=not_negative,
        metavar="W")
    add(g, "recon_weight", "weight of the reconstruction loss, 0 switches it off",
        type=not_negative, metavar="W")
    add(g, "cluster_size", "number of centroids K; a queue must hold many times as many clips",
        type=integer, metavar="K")
    add(g, "queue_size", "steps whose features are clustered", type=integer, metavar="STEPS")
    add(g, "refit_every", "steps between two k-means fits", type=integer, metavar="STEPS")

    g = parser.add_argument_group("optimisation")
    add(g, "batch_size",
        "videos per step over ALL ranks; more negatives help, up to what memory holds",
        type=integer, metavar="N")
    g.add_argument("--epochs", type=integer, default=EPOCHS[stage], metavar="N",
                   help=f"passes over the videos (default {EPOCHS[stage]})")
    add(g, "lr", "Adam's learning rate at its peak; try 1e-3 for small data", type=number,
        metavar="LR")
    g.add_argument(
        "--warmup_steps", type=int, metavar="N", help=
        "steps of linear warm-up before the cosine decay (default: a tenth of all steps, at most "
        "1000)"
    )
    g.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), help=
        "of the encoders; losses and clustering are always fp32 (default: bf16 on GPUs that have "
        "it, else fp32)"
    )
    g.add_argument("--max_steps", type=integer, metavar="N",
                   help="stop after so many steps; the schedule stays as it is")

    g = parser.add_argument_group("run")
    g.add_argument("--out", type=Path, metavar="DIR",
                   help="run folder (default runs/stage..., by pair and data)")
    g.add_argument(
        "--resume", action=argparse.BooleanOptionalAction, default=True, help=
        "go on from the run folder's checkpoint if there is one; --no-resume keeps the old folder "
        "as "
        "<name>.1 and starts anew")
    g.add_argument("--seed", type=int, metavar="N",
                   help="of weights, sampling and clustering (default 0)")
    g.add_argument("--device", default="auto", metavar="DEV",
                   help="auto, cpu, cuda or cuda:N (default auto)")
    g.add_argument(
        "--save_every", type=integer, default=1000, metavar="STEPS",
        help="steps between checkpoints within an epoch (default 1000); a kill costs at most these")
    g.add_argument("--log_every", type=integer, default=10, metavar="STEPS",
                   help="steps between lines of log.jsonl (default 10); each waits for the GPU")
    g.add_argument("--tensorboard", action=argparse.BooleanOptionalAction, default=False,
                   help="also write TensorBoard events to the run folder (pip install tensorboard)")


# What stage 2 takes from the run it starts from unless it is given: the data and all that must not
# differ between stages.
INHERITED = ("data", "word2vec", "n_pair", "min_time", "max_words", "audio_frames", "audio_augment",
             "embd_dim", "recon_dim", "audio_width", "temperature", "similarity", "cluster_weight",
             "recon_weight", "cluster_size", "queue_size", "refit_every", "batch_size", "lr",
             "precision", "seed", "preset")


def complete(args: argparse.Namespace, inherited: dict | None = None) -> argparse.Namespace:
    """Fill in what was not given: from ``inherited``, then from the preset, which follows from the
    data."""
    inherited = inherited or {}
    for name in INHERITED:
        if getattr(args, name, None) is None:
            value = inherited.get(name)
            setattr(args, name, Path(value) if name in ("data", "word2vec") and value else value)
    shards = DATA.with_suffix("")
    if args.data is None:
        found = DATA if DATA.exists() else shards if shards.is_dir() else None
        if args.preset == "paper" and found is None:
            raise SystemExit(
                f"--preset paper: no data at {DATA}; prepare it (python -m mcn_ext.prepare "
                f"howto100m --help) "
                "or give --data")
        args.data = DEMO / "train.h5" if found is None or args.preset == "demo" else found
    args.demo = args.data == DEMO / "train.h5"
    if not args.demo and not args.data.exists():
        raise SystemExit(
            f"--data {args.data}: no such store; prepare one with python -m mcn_ext.prepare, or "
            f"check the path"
        )
    if args.preset is None:
        args.preset = "demo" if args.demo else "paper"
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name, None) is None:
            # The published objective is the dot product at temperature 1.
            setattr(args, name,
                    1.0 if name == "temperature" and args.similarity == "dot" else value)
    args.similarity = args.similarity or "cosine"
    args.seed = args.seed or 0
    if args.word2vec is None and WORD2VEC.exists() and not args.demo:
        args.word2vec = WORD2VEC
    if args.word2vec is not None and not args.word2vec.is_file():
        raise SystemExit(
            f"--word2vec {args.word2vec}: no such file; leave it out to train vectors on the "
            f"captions"
        )
    return args


def as_dict(args: argparse.Namespace) -> dict:
    """Plain values, for args.json and checkpoints."""
    return {
        key: str(value) if isinstance(value, Path) else value
        for key, value in sorted(vars(args).items())
    }
