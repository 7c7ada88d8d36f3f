"""python -m mcn_ext.prepare KIND ...: raw material -> the stores the training scripts read."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from mcn_ext.train.flags import Parser, not_negative, pair, positive

MODULES = {"msrvtt": "youcook2", "miningyoutube": "crosstask"}  # of the other kinds, their name
CAPTIONS = "caption.pickle, a .json, or a folder with one start,end,text CSV per video"


def add_output(p: Parser, out: str) -> None:
    p.add_argument(
        "--out",
        type=Path,
        default=Path(out),
        metavar="PATH",
        help=f"where to write (default {out}, where the scripts look); a path that does not "
        "end in .h5 becomes a folder of shards: better from some 100 GB on, as nothing is "
        "joined at the end",
    )
    p.add_argument(
        "--overwrite",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="replace what is at --out; without it a run that was interrupted is resumed",
    )


def add_shards(p: Parser, mib: int) -> None:
    p.add_argument(
        "--shard_mib",
        type=positive(float),
        default=mib,
        metavar="MIB",
        help=f"features gathered in memory before they are written (default {mib}); a kill loses "
        "at most these",
    )


def add_features(p: Parser, row: str, names: str, audio: str) -> None:
    """The flags of kinds that read folders of features."""
    about = f"videos: header {row}"
    p.add_argument("--list", type=Path, dest="list_file", required=True, metavar="CSV", help=about)
    about = f"folder of {names}"
    p.add_argument("--features", type=Path, required=True, metavar="DIR", help=about)
    p.add_argument("--features_audio", type=Path, metavar="DIR", help=f"folder of {audio}")
    for stream, rate in (("2d", 1.0), ("3d", 1.5)):
        about = f"rows of {stream} features per second (default {rate})"
        p.add_argument(f"--rate_{stream}", type=float, default=rate, metavar="HZ", help=about)
    about = "reading threads (default 4); more on network disks"
    p.add_argument("--workers", type=positive(int), default=4, metavar="N", help=about)
    add_shards(p, 512)


def add_howto100m(p: Parser) -> None:
    audio = "<path>/<id>_spec.npz (default: --features)"
    add_features(p, "'path', rows topic/sub/VIDEOID", "<path>/<id>_2d.npz and _3d.npz", audio)
    p.add_argument("--captions", type=Path, required=True, metavar="FILE", help=CAPTIONS)


def add_clips(p: Parser, about: str) -> None:
    p.add_argument("pickle_file", type=Path, metavar="PICKLE", help=about)


def add_steps(p: Parser, row: str, key: str, annotation: str, more: str = "") -> None:
    """The flags of CrossTask and MiningYouTube."""
    add_features(
        p,
        row,
        "<id>_2d.npy and <id>_3d.npy (or <id>.npz with 'features' for 3D)",
        "<id>.npz with 'arr_0' (without it: <id>_spec.npz in --features, if any)",
    )
    about = f"folder of {annotation}.npy (seconds, steps) of 0 and 1, or .csv (step,start,end)"
    p.add_argument("--annotations", type=Path, required=True, metavar="DIR", help=about)
    about = f"JSON {{{key}: [step, ...]}}{more}"
    p.add_argument("--steps", type=Path, required=True, metavar="FILE", help=about)


def add_videos(p: Parser) -> None:
    p.add_argument(
        "paths",
        type=Path,
        nargs="+",
        metavar="FILE_OR_DIR",
        help="media files, or folders of them; a video's id is its file's name",
    )
    p.add_argument(
        "--captions",
        type=Path,
        metavar="FILE",
        help=".srt, .vtt, .json or .csv (start,end,text) of one video; .json, .pickle or a .csv "
        "with a column id of several; or a folder with ID.srt and the like. Videos without are "
        "kept, but not trained on",
    )
    p.add_argument(
        "--weights",
        type=Path,
        metavar="PTH",
        help="ResNet-152's weights under torchvision's names (resnet152-394f9c45.pth)",
    )
    p.add_argument(
        "--random_weights",
        action="store_true",
        help="an untrained ResNet-152, to try the rest; the store says so",
    )
    p.add_argument(
        "--streams",
        nargs="+",
        default=[],
        metavar="NAME=DIR:RATE",
        help="features extracted elsewhere, as 3d=DIR:1.5: DIR/ID.npz, .npy or ID_3d.npz of "
        "(rows, width), RATE rows a second; 2d=DIR:1 replaces ResNet-152",
    )
    p.add_argument("--device", metavar="DEVICE", help="for ResNet-152 (default: a GPU if any)")
    about = "frames of a video at a time (default 32); more for a large GPU"
    p.add_argument("--batch_size", type=positive(int), default=32, metavar="N", help=about)
    about = "decoding processes (default 0: one a core, at most 16)"
    p.add_argument("--workers", type=not_negative(int), default=0, metavar="N", help=about)
    about = "a decoder without a sign of life for so long is ended, its video skipped (300)"
    p.add_argument("--time_limit", type=positive(float), default=300, metavar="S", help=about)
    add_shards(p, 64)


def add_demo(p: Parser) -> None:
    about = "another seed, other data (default 0)"
    p.add_argument("--seed", type=not_negative(int), default=0, metavar="N", help=about)
    for modality in ("video", "audio"):
        p.add_argument(
            f"--{modality}_noise",
            type=not_negative(float),
            default=1.0,
            metavar="X",
            help=f"noise of the {modality} alone: 0 is clean, 2 twice as noisy (default 1); to see "
            "which pair to align first when modalities differ",
        )
    about = "training videos (default 256)"
    p.add_argument("--videos", type=positive(int), default=256, metavar="N", help=about)


def add_published(p: Parser) -> None:
    p.add_argument("file", type=Path, help="state dict: .pth, .pt or .safetensors")
    p.add_argument(
        "--data",
        type=Path,
        nargs="+",
        metavar="STORE",
        help="stores it will read: their captions' words get vectors, their video streams must "
        "fit (default: those of data/ that are there)",
    )
    p.add_argument(
        "--word2vec",
        type=Path,
        metavar="FILE",
        help="the word vectors its text encoder was trained on (default data/word2vec.bin)",
    )
    p.add_argument(
        "--pair",
        type=pair,
        metavar="AV|VT|AT",
        help="keep these modalities alone, to add the third with train_stage2.py",
    )


def parser() -> Parser:
    top = Parser(prog="python -m mcn_ext.prepare", description=__doc__)
    kinds = top.add_subparsers(dest="kind", required=True, metavar="KIND", parser_class=Parser)

    def add(kind: str, about: str, out: str | None = None) -> Parser:
        p = kinds.add_parser(kind, help=about, description=about)
        add_output(p, out or f"data/{kind}.h5")
        return p

    add_howto100m(add("howto100m", "feature folders + captions -> training store"))
    nothing = "Nothing in the pickle is executed."
    add_clips(
        add("youcook2", f"youcook_val_audio.pkl -> evaluation store. {nothing}"),
        "youcook_val_audio.pkl",
    )
    add_clips(
        add("msrvtt", f"MSR-VTT's pickle -> evaluation (or training) store. {nothing}"),
        "with eval_caption: one caption per clip; with caption: all of them, to train on",
    )
    about = "features and annotated steps -> evaluation store and OUT.steps.json"
    add_steps(
        add("crosstask", f"CrossTask's {about}"),
        "'video_id,task'",
        "task",
        "<task>_<id>",
        ", or the release's tasks_primary.txt",
    )
    add_steps(add("miningyoutube", f"MiningYouTube's {about}"), "'video_id'", "video id", "<id>")
    add_videos(
        add(
            "videos",
            "raw videos -> store: a frame a second through ResNet-152, log-mel spectrograms, "
            "captions. Needs PyAV (pip install av)",
        )
    )
    add_demo(add("demo", "a made-up data set: DIR/train.h5 and DIR/eval.h5", "data/demo"))
    about = "weights of the published MCN, AVLnet or AVLnet-Text -> run folder"
    add_published(add("published", about, "runs/published-mcn"))
    return top


def main(argv=None) -> int:
    args = vars(parser().parse_args(argv))
    from mcn_ext.data.store import StoreError
    from mcn_ext.prepare.unpickle import UnsafePickle

    kind = args.pop("kind")
    module = importlib.import_module(f"mcn_ext.prepare.{MODULES.get(kind, kind)}")
    if "rate_2d" in args:
        args["rates"] = {"2d": args.pop("rate_2d"), "3d": args.pop("rate_3d"), "mel": 100.0}
    if kind in {"youcook2", "crosstask"} | MODULES.keys():
        args["kind"] = kind
    try:
        print(module.prepare(**args))
    except (StoreError, UnsafePickle, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
