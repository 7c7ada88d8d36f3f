"""Zero-shot retrieval with a trained run: table, metrics.json and similarity.png in the run folder.

    python evaluate.py --youcook2                 # the newest run, on data/youcook2.h5
    python evaluate.py --youcook2 my_clips.h5 --run runs/stage2-AV_T

A run on the demo data is evaluated on the demo data's evaluation clips.
"""

import argparse
import json
import sys
from pathlib import Path

from mcn_ext import flags

DIRECTIONS = ("text->video+audio", "text->video", "text->audio", "audio->video")


def embed(model, reader, table, device, batch_size):
    """An evaluation store -> ({modality: (n, D) fp32}, {modality: (n,) bool}), on the CPU."""
    import torch
    from tqdm import tqdm

    from mcn_ext.data import collate, to_device

    embeddings, valid = {m: [] for m in model.modalities}, {m: [] for m in model.modalities}
    n = len(reader.store)
    with torch.inference_mode():
        for begin in tqdm(range(0, n, batch_size), desc="embed", unit="batch", mininterval=0.5):
            items = [reader.read(i, [(0, 0)]) for i in range(begin, min(begin + batch_size, n))]
            batch = to_device(collate(items), device, table)
            for name in model.modalities:
                embeddings[name].append(model.encode(name, batch)[1].float().cpu())
                valid[name].append(batch["valid"][name].cpu())
    return ({m: torch.cat(e) for m, e in embeddings.items()},
            {m: torch.cat(v) for m, v in valid.items()})


def rank_direction(embeddings, valid, direction, similarity):
    """(similarity (n, n), ranks (n,)) by the candidate modalities' sum; missing is a miss."""
    import torch

    from mcn_ext.metrics import ranks
    from mcn_ext.reference import unit_rows

    query, candidates = direction.split("->")
    prepared = {m: unit_rows(e) if similarity == "cosine" else e for m, e in embeddings.items()}
    scores, present = 0.0, torch.zeros(len(embeddings[query]), dtype=torch.bool)
    for name in candidates.split("+"):
        part = prepared[query] @ prepared[name].T
        scores = scores + torch.where(valid[name][None, :], part, torch.zeros_like(part))
        present |= valid[name]
    # Clips with nothing to compare stand behind all others; queries without content find nothing.
    scores = torch.where(present[None, :], scores, scores.min() - 1.0)
    rank = ranks(scores)
    rank[~(valid[query] & present).numpy()] = len(rank)
    return scores, rank


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
    parser.add_argument("--similarity", choices=("cosine", "dot"),
                        help="default: what the run was trained with")
    parser.add_argument("--batch_size", type=flags.positive(int), default=64, metavar="N",
                        help="clips embedded at a time (default 64)")
    parser.add_argument("--device", default="auto", metavar="DEV",
                        help="auto, cpu, cuda or cuda:N (default auto)")
    args = parser.parse_args(argv)
    if args.youcook2 is None:
        parser.error("say what to evaluate on: --youcook2 [STORE]")

    import torch

    from mcn_ext import checkpoint, distributed, training
    from mcn_ext.data import ClipReader
    from mcn_ext.log import write_text
    from mcn_ext.metrics import summarize, table
    from mcn_ext.model import MCN, MODALITIES
    from mcn_ext.report import similarity_picture
    from mcn_ext.store import Store, StoreError
    from mcn_ext.words import WordVectors, vectors_for

    # ------------------------------------------------------------------------------- run, data
    args.run = args.run or (args.checkpoint.parent if args.checkpoint
                            else checkpoint.find_run(Path("runs")))
    if args.run is None:
        raise SystemExit(
            "no run in runs/; train one (python train_stage1.py --pair AV) or name one with --run")
    file = args.checkpoint or args.run / checkpoint.LATEST
    content = checkpoint.load(file)
    sizes, trained = content["sizes"], content["args"]
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
    words = None
    if "T" in sizes["modalities"]:
        words = kept = WordVectors.load(args.run / training.WORDS)
        if trained["word2vec"] and Path(trained["word2vec"]).exists():  # also words never met
            words = vectors_for(store, Path(trained["word2vec"]),
                                data.with_name(data.name + ".words.npz"))
            if not kept.agrees(words):
                raise SystemExit(f"{trained['word2vec']} is not the file {args.run} was trained "
                                 "with; put that back, or move this one away")
        elif trained["word2vec"]:
            print(f"{trained['word2vec']} is gone: only words of the training captions are known")
    reader = ClipReader(
        store, video_streams=tuple(sizes["video_dims"]) if "V" in sizes["modalities"] else (),
        audio="A" in sizes["modalities"], words=words, max_words=trained["max_words"],
        audio_frames=5120)  # as published: up to 51 s of a clip
    word_table = torch.from_numpy(words.vectors).to(device) if words is not None else None

    # --------------------------------------------------------------------- embed, rank, report
    embeddings, valid = embed(model, reader, word_table, device, args.batch_size)
    names = {MODALITIES[m] for m in sizes["modalities"]}
    directions = [d for d in DIRECTIONS if set(d.replace("->", "+").split("+")) <= names]
    similarity = args.similarity or trained["similarity"]
    result = {"n": len(store), "data": str(data), "checkpoint": str(file)}
    try:
        for i, direction in enumerate(directions):
            scores, rank = rank_direction(embeddings, valid, direction, similarity)
            result[direction] = summarize(rank)
            if i == 0:
                similarity_picture(scores.numpy(), rank, direction, args.run / "similarity.png")
    except FloatingPointError as error:
        raise SystemExit(f"{file}: {error}") from None
    metrics_file = args.run / "metrics.json"
    metrics = json.loads(metrics_file.read_text()) if metrics_file.exists() else {}
    write_text(metrics_file, json.dumps(metrics | {"youcook2": result}, indent=1) + "\n")
    demo = store.source.startswith("demo data")
    missing = {m: int((~v).sum()) for m, v in valid.items() if not v.all()}
    print(f"{args.run.name}: {data}" + (" (DEMO DATA, made up)" if demo else "")
          + (f"; counted as misses or left out of sums: {missing}" if missing else ""))
    print(table({d: result[d] for d in directions}, len(store)))
    print(f"written: {metrics_file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
