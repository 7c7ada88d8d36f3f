"""Zero-shot retrieval with a trained run: table, metrics.json and similarity.png in the run folder.

    python evaluate.py --youcook2                 # the newest run, on data/youcook2.h5
    python evaluate.py --youcook2 my_clips.h5 --run runs/stage2-AV_T
    python evaluate.py --youcook2 --init_published mcn.pth --word2vec GoogleNews.bin

A run on the demo data is evaluated on the demo data's evaluation clips.
"""

import argparse
import json
import sys
from itertools import product
from pathlib import Path

from mcn_ext import flags


def main(argv=None):
    # --------------------------------------------------------- flags (torch is not loaded yet)
    parser = flags.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--youcook2", nargs="?", const="", metavar="STORE",
        help=f"retrieval over the clips of STORE (default {flags.YOUCOOK2}, or the demo's for a "
        "demo run)")
    parser.add_argument("--run", type=Path, metavar="DIR",
                        help="run folder (default: the newest, stage 2 before stage 1)")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE",
        help="a checkpoint of it, such as RUN/epoch-05.pt (default: RUN/checkpoint.pt)")
    parser.add_argument("--init_published", type=Path, metavar="FILE", help="published weights in "
                        "place of a run; results go to runs/published-<name>")
    parser.add_argument("--word2vec", type=Path, metavar="FILE", help="for --init_published: its "
                        f"text encoder's word vectors (default {flags.WORD2VEC})")
    parser.add_argument("--similarity", choices=("cosine", "dot"),
                        help="default: what the run was trained with, dot for --init_published")
    parser.add_argument("--batch_size", type=flags.positive(int), default=64, metavar="N",
                        help="clips embedded at a time (default 64)")
    parser.add_argument("--device", default="auto", metavar="DEV",
                        help="auto, cpu, cuda or cuda:N (default auto)")
    parser.add_argument("--all_directions", action="store_true", help="every query and candidate, "
                        "pairs of modalities too, not only the four customary ones")
    parser.add_argument(
        "--fusion", nargs="+", choices=("sum", "mean", "bank"), default=["sum"], help="how several "
        "modalities and candidates compare; several may be given (default sum). sum: of cosines, "
        "the published protocol; mean: cosine to the mean embedding; bank: sum, less what draws "
        "training clips' queries to a candidate (no evaluation data used)")
    parser.add_argument("--bank_size", type=flags.positive(int), default=2000, metavar="N",
                        help="training clips that --fusion bank embeds (default 2000)")
    parser.add_argument("--keep_embeddings", action="store_true", help="write RUN/youcook2.npz: "
                        "every query's rank by direction, and all embeddings (fp16)")
    parser.add_argument("--require_complete", action="store_true", help="an error, not a result, "
                        "for a run that has not been trained to its end")
    args = parser.parse_args(argv)
    if args.youcook2 is None:
        parser.error("say what to evaluate on: --youcook2 [STORE]")
    if args.init_published and (args.run or args.checkpoint):
        parser.error("--init_published is in place of --run and --checkpoint")
    if args.word2vec and not args.init_published:
        parser.error("--word2vec is for --init_published; a run remembers its words")

    import numpy as np
    import torch

    from mcn_ext import checkpoint, distributed, published, retrieval, training
    from mcn_ext.data import ClipReader
    from mcn_ext.log import replace, write_text
    from mcn_ext.metrics import summarize, table
    from mcn_ext.model import MCN
    from mcn_ext.report import similarity_picture
    from mcn_ext.store import Store, StoreError
    from mcn_ext.words import WordVectors, vectors_for

    # ------------------------------------------------------------------------------- run, data
    content = published.for_evaluation(args) if args.init_published else None
    args.run = args.run or (args.checkpoint.parent if args.checkpoint
                            else checkpoint.find_run(Path("runs")))
    if args.run is None:
        raise SystemExit(
            "no run in runs/; train one (python train_stage1.py --pair AV) or name one with --run")
    file = args.init_published or args.checkpoint or args.run / checkpoint.LATEST
    content = content or checkpoint.load(file)
    sizes, trained = content["sizes"], content["args"]
    if args.require_complete and not content["complete"]:
        raise SystemExit(f"{file}: step {content['step']}, not the run's end; the command that "
                         "trains it goes on")
    data = Path(args.youcook2 or (flags.DEMO / "eval.h5" if trained["demo"] else flags.YOUCOOK2))
    if not data.exists():
        raise SystemExit(
            f"--youcook2 {data}: no such store; make it with: python -m mcn_ext.prepare youcook2 "
            f"youcook_val_audio.pkl --out {data}")
    try:
        store = Store(data)
    except StoreError as error:
        raise SystemExit(f"--youcook2 {error}") from None
    training.check_widths(store, sizes, "--youcook2")
    if store.n_captions != len(store):
        raise SystemExit(
            f"--youcook2 {data}: {store.n_captions} captions for {len(store)} clips; an evaluation "
            "store has one each (is it a training store?)")
    if "A" in sizes["modalities"] and "mel" not in store.dims:
        raise SystemExit(f"--youcook2 {data}: no stream 'mel' for the run's audio in it")

    # ---------------------------------------------------------------------------- model, words
    device = distributed.init(args.device)
    model = MCN(**sizes).to(device).eval()
    model.load_state_dict(content["model"])
    words = known = None
    if "T" in sizes["modalities"]:
        words = known = WordVectors.load(args.run / training.WORDS)
        if trained["word2vec"] and Path(trained["word2vec"]).exists():  # also words never met
            words = vectors_for(store, Path(trained["word2vec"]),
                                data.with_name(data.name + ".words.npz"))
            if not known.agrees(words):
                raise SystemExit(f"{trained['word2vec']} is not the file {args.run} was trained "
                                 "with; put that back, or move this one away")
        elif trained["word2vec"]:
            print(f"{trained['word2vec']} is gone: only words of the training captions are known")
    def embed(store, clips, words, audio_frames):
        reader = ClipReader(
            store, video_streams=tuple(sizes["video_dims"]) if "V" in sizes["modalities"] else (),
            audio="A" in sizes["modalities"], words=words, max_words=trained["max_words"],
            audio_frames=audio_frames)
        vectors = torch.from_numpy(words.vectors).to(device) if words is not None else None
        return retrieval.embed(model, reader, clips, device, vectors, args.batch_size)

    # --------------------------------------------------------------------- embed, rank, report
    clips = embed(store, [(i, [(0, 0)]) for i in range(len(store))], words,
                  audio_frames=5120)  # as published: up to 51 s of a clip
    bank = None
    if "bank" in args.fusion:
        try:
            source = Store(Path(trained["data"]))
        except StoreError as error:
            raise SystemExit(f"--fusion bank needs the training store: {error}") from None
        bank = embed(source, retrieval.some_clips(source, args.bank_size, trained["min_time"]),
                     known, trained["audio_frames"])
    directions = [d for d in retrieval.directions(model.modalities)
                  if args.all_directions or d in retrieval.MAIN]
    similarity = args.similarity or trained["similarity"]
    result = {"n": len(store), "data": str(data), "checkpoint": str(file),
              "step": content["step"], "complete": content["complete"]}
    kept = {f"embedding:{m}": e.half().numpy() for m, e in clips[0].items()}
    kept |= {f"valid:{m}": v.numpy() for m, v in clips[1].items()}
    rows = {}
    try:
        for direction, fusion in product(directions, args.fusion):
            if fusion == "mean" and "+" not in direction.split("->")[1]:
                continue  # a query's length changes no rank
            scores, rank = retrieval.rank(clips, direction, similarity, fusion, bank,
                                          trained["temperature"])
            name = direction + (f" ({fusion})" if fusion != "sum" else "")
            rows[name], kept[f"rank:{name}"] = summarize(rank), rank
            if len(rows) == 1:
                similarity_picture(scores.numpy(), rank, name, args.run / "similarity.png")
    except FloatingPointError as error:
        raise SystemExit(f"{file}: {error}") from None
    result |= rows
    if args.keep_embeddings:
        replace(args.run / "youcook2.npz", lambda stream: np.savez(stream, **kept))
    metrics_file = args.run / "metrics.json"
    metrics = json.loads(metrics_file.read_text()) if metrics_file.exists() else {}
    write_text(metrics_file, json.dumps(metrics | {"youcook2": result}, indent=1) + "\n")
    demo = store.source.startswith("demo data")
    missing = {m: int((~v).sum()) for m, v in clips[1].items() if not v.all()}
    print(f"{args.run.name}: {data}" + (" (DEMO DATA, made up)" if demo else "")
          + (f"; counted as misses or left out of sums: {missing}" if missing else ""))
    print(table(rows, len(store)))
    print(f"written: {metrics_file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
