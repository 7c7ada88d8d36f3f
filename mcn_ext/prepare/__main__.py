"""python -m mcn_ext.prepare KIND ...: raw material -> the stores the training scripts read."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mcn_ext.train import flags
from mcn_ext.train.flags import Parser


def parser() -> Parser:
    top = Parser(prog="python -m mcn_ext.prepare", description=__doc__)
    kinds = top.add_subparsers(dest="kind", required=True, metavar="KIND", parser_class=Parser)

    def common(p, out):
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

    def features(p, names, audio):
        p.add_argument(
            "--features", type=Path, required=True, metavar="DIR", help=f"folder of {names}"
        )
        p.add_argument("--features_audio", type=Path, metavar="DIR", help=f"folder of {audio}")
        p.add_argument(
            "--rate_2d",
            type=float,
            default=1.0,
            metavar="HZ",
            help="2D rows per second (default 1.0)",
        )
        p.add_argument(
            "--rate_3d",
            type=float,
            default=1.5,
            metavar="HZ",
            help="3D rows per second (default 1.5)",
        )
        p.add_argument(
            "--workers",
            type=int,
            default=4,
            metavar="N",
            help="reading threads (default 4); more on network disks",
        )
        p.add_argument(
            "--shard_mib",
            type=float,
            default=512,
            metavar="MIB",
            help="features gathered in memory before they are written (default 512); a kill loses "
            "at most these",
        )

    p = kinds.add_parser(
        "howto100m",
        help="feature folders + captions -> training store",
        description="HowTo100M features, spectrograms and captions -> training store.",
    )
    p.add_argument(
        "--list",
        type=Path,
        required=True,
        metavar="CSV",
        help="videos: header 'path', rows topic/sub/VIDEOID",
    )
    features(p, "<path>/<id>_2d.npz and _3d.npz", "<path>/<id>_spec.npz (default: --features)")
    p.add_argument(
        "--captions",
        type=Path,
        required=True,
        metavar="FILE",
        help="caption.pickle, a .json, or a folder with one start,end,text CSV per video",
    )
    common(p, "data/howto100m.h5")
    p = kinds.add_parser(
        "youcook2",
        help="youcook_val_audio.pkl -> evaluation store",
        description="YouCook2's evaluation pickle -> store. Nothing in the pickle is executed.",
    )
    p.add_argument("pickle", type=Path, help="youcook_val_audio.pkl")
    common(p, "data/youcook2.h5")
    p = kinds.add_parser(
        "msrvtt",
        help="MSR-VTT's pickle -> evaluation (or training) store",
        description="MSR-VTT's pickle -> store. Clips without audio are kept and counted. Nothing "
        "in the pickle is executed.",
    )
    p.add_argument(
        "pickle",
        type=Path,
        help="with eval_caption: one caption per clip; with "
        "caption: all of a clip's captions, to train on",
    )
    common(p, "data/msrvtt.h5")
    for kind, name, row, key, annotation in (
        ("crosstask", "CrossTask", "'video_id,task'", "task", "<task>_<id>"),
        ("miningyoutube", "MiningYouTube", "'video_id'", "video id", "<id>"),
    ):
        p = kinds.add_parser(
            kind,
            help=f"{name}'s features and annotated steps -> evaluation store",
            description=f"{name} -> store, and beside it OUT.steps.json: the steps and where they "
            "are, which localisation is measured by.",
        )
        p.add_argument(
            "--list", type=Path, required=True, metavar="CSV", help=f"videos: header {row}"
        )
        features(
            p,
            "<id>_2d.npy and <id>_3d.npy (or <id>.npz with 'features' for 3D)",
            "<id>.npz with 'arr_0' (without it: <id>_spec.npz in --features, if any)",
        )
        p.add_argument(
            "--annotations",
            type=Path,
            required=True,
            metavar="DIR",
            help=f"folder of {annotation}.npy (seconds, steps) of 0 and 1, or "
            f"{annotation}.csv with rows step,start,end",
        )
        p.add_argument(
            "--steps",
            type=Path,
            required=True,
            metavar="FILE",
            help=f"JSON {{{key}: [step, ...]}}"
            + (", or the release's tasks_primary.txt" if kind == "crosstask" else ""),
        )
        common(p, f"data/{kind}.h5")
    p = kinds.add_parser(
        "videos",
        help="raw videos (or sound files) -> store",
        description="Raw videos -> store: a frame a second through ResNet-152, log-mel "
        "spectrograms, captions. Needs PyAV (pip install av). What cannot be decoded is listed in "
        "OUT.skipped.csv.",
    )
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
    p.add_argument(
        "--batch_size",
        type=flags.positive(int),
        default=32,
        metavar="N",
        help="frames of a video at a time (default 32); more for a large GPU",
    )
    p.add_argument(
        "--workers",
        type=flags.not_negative(int),
        default=0,
        metavar="N",
        help="decoding processes (default 0: one a core, at most 16)",
    )
    p.add_argument(
        "--time_limit",
        type=flags.positive(float),
        default=300,
        metavar="S",
        help="a decoder without a sign of life for so long is ended, its video skipped (300)",
    )
    p.add_argument(
        "--shard_mib",
        type=flags.positive(float),
        default=64,
        metavar="MIB",
        help="features gathered in memory before they are written (default 64: about "
        "1.5 hours of video); a kill loses at most these",
    )
    common(p, "data/videos.h5")
    p = kinds.add_parser(
        "demo",
        help="a made-up data set to try everything on",
        description="The demo data: DIR/train.h5 and DIR/eval.h5, a few seconds.",
    )
    p.add_argument(
        "--seed",
        type=flags.not_negative(int),
        default=0,
        metavar="N",
        help="another seed, other data (default 0)",
    )
    for modality in ("video", "audio"):
        p.add_argument(
            f"--{modality}_noise",
            type=flags.not_negative(float),
            default=1.0,
            metavar="X",
            help=f"noise of the {modality} alone: 0 is clean, 2 twice as noisy (default 1); to see "
            "which pair to align first when modalities differ",
        )
    p.add_argument(
        "--videos",
        type=flags.positive(int),
        default=256,
        metavar="N",
        help="training videos (default 256)",
    )
    common(p, "data/demo")
    return top


def main(argv=None) -> int:
    args = parser().parse_args(argv)
    from mcn_ext.data.store import StoreError
    from mcn_ext.prepare.unpickle import UnsafePickle

    try:
        if args.kind in ("howto100m", "crosstask", "miningyoutube"):
            from mcn_ext.prepare import crosstask, howto100m

            how = {
                "workers": args.workers,
                "overwrite": args.overwrite,
                "shard_mib": args.shard_mib,
                "rates": {"2d": args.rate_2d, "3d": args.rate_3d, "mel": howto100m.MEL_RATE},
            }
            folders = args.list, args.features, args.features_audio
            summary = (
                howto100m.prepare(*folders, args.captions, args.out, **how)
                if args.kind == "howto100m"
                else crosstask.prepare(
                    *folders, args.annotations, args.steps, args.out, protocol=args.kind, **how
                )
            )
        elif args.kind in ("youcook2", "msrvtt"):
            from mcn_ext.prepare import youcook2

            summary = youcook2.prepare(
                args.pickle, args.out, kind=args.kind, overwrite=args.overwrite
            )
        elif args.kind == "videos":
            from mcn_ext.prepare import videos

            summary = videos.prepare(
                args.paths,
                args.captions,
                args.out,
                weights=args.weights,
                random_weights=args.random_weights,
                streams=args.streams,
                workers=args.workers,
                batch_size=args.batch_size,
                device=args.device,
                time_limit=args.time_limit,
                overwrite=args.overwrite,
                shard_mib=args.shard_mib,
            )
        else:
            from mcn_ext.prepare import demo

            summary = demo.prepare(
                args.out,
                seed=args.seed,
                overwrite=args.overwrite,
                video_noise=args.video_noise,
                audio_noise=args.audio_noise,
                videos=args.videos,
            )
    except (StoreError, UnsafePickle, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
