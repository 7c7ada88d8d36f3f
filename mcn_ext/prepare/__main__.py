"""python -m mcn_ext.prepare KIND ...: raw material -> the stores the training scripts read."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from mcn_ext.train import flags
from mcn_ext.train.flags import NOISE, RATE, Parser, between, not_negative, pair, positive

MODULES = {"msrvtt": "youcook2", "miningyoutube": "crosstask"}  # of the other kinds, their name


def add(p: Parser, name: str, kind, metavar: str, about: str, default=None, **more) -> None:
    p.add_argument(name, type=kind, metavar=metavar, help=about, default=default, **more)


def add_shards(p: Parser, mib: int) -> None:
    about = f"features gathered in memory before they are written (default {mib}); a kill loses "
    add(p, "--shard_mib", positive(float), "MIB", about + "at most these", mib)


def add_streams(p: Parser) -> None:
    about = """features extracted elsewhere, as 3d=DIR:1.5 or NAME=DIR:RATE:audio: (rows, width),
        RATE rows a second, in ID.npz, .npy, .pt, .pth or .pth.tar, in folders or .tar files below
        DIR, which may be a .tar itself; 2d=... takes the place of other 2D features"""
    add(p, "--streams", str, "NAME=DIR:RATE", about, (), nargs="+")


def add_clips(p: Parser, pickle_file: str) -> None:
    """The flags of kinds that read a pickle of clips."""
    add(p, "pickle_file", Path, "PICKLE", pickle_file)
    add_streams(p)
    about = """the words spoken in the clips, for evaluate.py --fusion words: {id: text}, or a list
        of {"video_id", "subtitle"}, with "desc", the caption, where ids repeat"""
    add(p, "--speech", Path, "JSON", about)


def add_features(p: Parser, row: str, names: str, audio: str, needs_list: bool) -> None:
    """The flags of kinds that read folders of features."""
    about = f"videos: header {row}"
    add(p, "--list", Path, "CSV", about, dest="list_file", required=needs_list)
    add(p, "--features", Path, "DIR", f"folder of {names}; or give --streams")
    add_streams(p)
    add(p, "--features_audio", Path, "DIR", f"folder of {audio}")
    for stream, rate in (("2d", 1.0), ("3d", 1.5)):
        about = f"rows of {stream} features per second (default {rate})"
        add(p, f"--rate_{stream}", between(float, *RATE), "HZ", about, rate)
    about = "reading threads (default 4); more on network disks"
    add(p, "--workers", between(int, 1, 1000), "N", about, 4)
    add_shards(p, 512)


def add_howto100m(p: Parser) -> None:
    names, audio = "<path>/<id>_2d.npz and _3d.npz", "<path>/<id>_spec.npz (default: --features)"
    row = "'path', rows topic/sub/VIDEOID (default: all ids of --streams)"
    add_features(p, row, names, audio, needs_list=False)
    about = "caption.pickle, a .json, or a folder with ID.csv (start,end,text), ID.en.vtt ..."
    add(p, "--captions", Path, "FILE", about, required=True)


def add_steps(p: Parser, row: str, key: str, annotation: str) -> None:
    """The flags of CrossTask and MiningYouTube."""
    names = "<id>_2d.npy and <id>_3d.npy (or <id>.npz with 'features' for 3D)"
    audio = "<id>.npz with 'arr_0' (without it: <id>_spec.npz in --features, if any)"
    add_features(p, row, names, audio, needs_list=True)
    about = f"folder of {annotation}.npy (seconds, steps) of 0 and 1, or .csv (step,start,end)"
    add(p, "--annotations", Path, "DIR", about, required=True)
    about = f"JSON {{{key}: [step, ...]}}, or CrossTask's tasks_primary.txt"
    add(p, "--steps", Path, "FILE", about, required=True)


def add_videos(p: Parser) -> None:
    about = "media files, or folders of them; a video's id is its file's name"
    add(p, "paths", Path, "FILE_OR_DIR", about, nargs="+")
    about = """subtitles (.srt .vtt .ass .sub ...), .json or .csv (start,end,text) of one video;
        .json, .pickle or a .csv with a column id of several; or a folder with ID.srt, ID.en.vtt and
        the like. Videos without are kept, but not trained on"""
    add(p, "--captions", Path, "FILE", about)
    about = "ResNet-152's weights under torchvision's names (resnet152-394f9c45.pth)"
    add(p, "--weights", Path, "PTH", about)
    about = "an untrained ResNet-152, to try the rest; the store says so"
    p.add_argument("--random_weights", action="store_true", help=about)
    add_streams(p)
    add(p, "--device", str, "DEVICE", "for ResNet-152 (default: a GPU if any)")
    about = "frames of a video at a time (default 32); more for a large GPU"
    add(p, "--batch_size", positive(int), "N", about, 32)
    about = "decoding processes (default 0: one a core, at most 16)"
    add(p, "--workers", between(int, 0, 1000), "N", about, 0)
    about = "a decoder without a sign of life for so long is ended, its video skipped (300)"
    add(p, "--time_limit", positive(float), "S", about, 300)
    add_shards(p, 64)


def add_demo(p: Parser) -> None:
    add(p, "--seed", not_negative(int), "N", "another seed, other data (default 0)", 0)
    for modality in ("video", "audio"):
        about = f"""noise of the {modality} alone: 0 is clean, 2 twice as noisy (default 1); to see
            which pair to align first when modalities differ"""
        add(p, f"--{modality}_noise", between(float, *NOISE), "X", about, 1.0)
    add(p, "--videos", positive(int), "N", "training videos (default 256)", 256)
    about = """share of training clips, 0 to 1, that change places with a neighbour in sound or in
        picture (default 0); to compare losses for pairs that do not belong together"""
    add(p, "--shift", between(float, 0, 1), "SHARE", about, 0.0)


def add_caption_features(p: Parser) -> None:
    add(p, "store", Path, "STORE", "a .h5 file or a folder of shards")
    about = """features made elsewhere, (captions, width) in the order of the store's captions: .npz
        with 'features' or 'arr_0', or .npy, which may be larger than memory"""
    add(p, "features", str, "NAME=FILE", about, nargs="?")
    add(p, "--model", str, "TEXT", "what made them: best a name or folder for --encoder")
    add(p, "--sha256", str, "HEX", "SHA-256 of its weights")
    about = "make them with this sentence encoder: a folder or a name of sentence-transformers"
    add(p, "--encoder", str, "NAME", about)
    add(p, "--name", str, "NAME", "what to call them (default: the last part of --encoder)")


def add_published(p: Parser) -> None:
    add(p, "file", Path, "FILE", "state dict: .pth, .pt or .safetensors")
    about = """stores it will read: their captions' words get vectors, the first one's video streams
        must fit (default: those of data/ that are there)"""
    add(p, "--data", Path, "STORE", about, nargs="+")
    about = "the vectors its text encoder was trained on (default data/word2vec.bin)"
    add(p, "--word2vec", Path, "FILE", about)
    about = "keep these modalities alone, to add the third with train_stage2.py"
    add(p, "--pair", pair, "AV|VT|AT", about)


def parser() -> Parser:
    top = Parser(prog="python -m mcn_ext.prepare", description=__doc__)
    kinds = top.add_subparsers(dest="kind", required=True, metavar="KIND", parser_class=Parser)

    def kind(name: str, about: str, out: str = "data/{}.h5") -> Parser:
        p = kinds.add_parser(name, help=about, description=about)
        if out := out.format(name):
            text = f"""where to write (default {out}); a store whose path does not end in .h5
                becomes a folder of shards: better from some 100 GB on, as nothing is joined"""
            add(p, "--out", Path, "PATH", text, Path(out))
        text = "replace what is there; without it a run that was interrupted is resumed"
        switch = argparse.BooleanOptionalAction
        p.add_argument("--overwrite", action=switch, default=False, help=text)
        return p

    add_howto100m(kind("howto100m", "feature folders + captions -> training store"))
    p = kind("youcook2", "youcook_val_audio.pkl -> evaluation store; nothing in it is executed")
    add_clips(p, "youcook_val_audio.pkl")
    p = kind("msrvtt", "MSR-VTT's pickle -> store; nothing in it is executed")
    about = "with eval_caption: one caption per clip; with caption: all of them, to train on"
    add_clips(p, about)
    about = "features and annotated steps -> evaluation store and OUT.steps.json"
    add_steps(kind("crosstask", f"CrossTask's {about}"), "'video_id,task'", "task", "<task>_<id>")
    add_steps(kind("miningyoutube", f"MiningYouTube's {about}"), "'video_id'", "video id", "<id>")
    about = """raw videos -> store: a frame a second through ResNet-152, log-mel spectrograms,
        captions. Needs PyAV (pip install av)"""
    add_videos(kind("videos", about))
    add_demo(kind("demo", "a made-up data set: DIR/train.h5 and DIR/eval.h5", "data/demo"))
    about = "features of captions by a frozen encoder -> into a store, for --text NAME"
    add_caption_features(kind("caption_features", about, ""))
    about = "weights of the published MCN, AVLnet or AVLnet-Text -> run folder"
    add_published(kind("published", about, "runs/published-mcn"))
    return top


def main(argv=None) -> int:
    args = vars(parser().parse_args(argv))
    from mcn_ext.console import printable
    from mcn_ext.data.store import StoreError
    from mcn_ext.data.unpickle import UnsafePickle

    kind = args.pop("kind")
    if "out" in args and not args["out"].name:
        raise SystemExit(f"--out {args['out']}: give the file or folder a name")
    module = importlib.import_module(f"mcn_ext.prepare.{MODULES.get(kind, kind)}")
    if kind in {"youcook2", "crosstask"} | MODULES.keys():
        args["kind"] = kind
    try:
        print(printable(module.prepare(**args)))
    except (StoreError, UnsafePickle, OSError) as error:
        print(printable(str(error)), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    flags.run(main)
