"""Stage 2: add the third modality to a stage-1 run, its encoders kept as they are or finetuned.

    python train_stage2.py --add T                          # onto the newest stage-1 run without T
    torchrun --nproc_per_node 4 train_stage2.py --add T --init runs/stage1-AV
    python train_stage2.py --add A --stage1_encoders finetune
    python train_stage2.py --add T --init runs/published-avlnet  # onto published encoders

Data, sizes and objective are the stage-1 run's unless given. The same command again resumes.
"""

import argparse
from pathlib import Path

from mcn_ext.train import flags


def get_args(argv=None):
    parser = flags.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--add",
        type=str.upper,
        choices=("A", "V", "T"),
        required=True,
        help="the modality to add: A audio, V video, T text",
    )
    parser.add_argument(
        "--init",
        type=Path,
        metavar="RUN",
        help="stage-1 run folder to start from (default: the newest that lacks the modality)",
    )
    parser.add_argument(
        "--stage1_encoders",
        choices=("frozen", "finetune"),
        default="frozen",
        help="frozen: only the new encoder learns (default); finetune: all three pairs train",
    )
    flags.add_training_flags(parser, stage=2)
    args = parser.parse_args(argv)
    return args


def main(argv=None):
    args = get_args(argv)  # torch is not loaded yet

    import torch

    from mcn_ext import distributed
    from mcn_ext.model import MCN, MODALITIES
    from mcn_ext.train import checkpoint, dry_run, training
    from mcn_ext.train.log import say

    # ------------------------------------------------------------------- the run to start from
    device = distributed.init(args.device)
    args.n_ranks = distributed.world()
    first = {"A": "VT", "V": "AT", "T": "AV"}[args.add]
    args.init = args.init or checkpoint.find_run(Path("runs"), stage=1, lacks=args.add)
    if args.init is None:
        raise SystemExit(
            f"no stage-1 run without {args.add} in runs/; train one (python "
            f"train_stage1.py --pair {first}) or name one with --init"
        )
    start = checkpoint.load(args.init / checkpoint.LATEST)
    first = start["sizes"]["modalities"]
    if args.add in first or len(first) != 2:
        fits = " or ".join(f"--add {m}" for m in "AVT" if m not in first and len(first) == 2)
        raise SystemExit(
            f"--add {args.add}: {args.init} was trained on {first}"
            + (", it has that modality already" if args.add in first else "")
            + f"; use {fits + ' or ' if fits else ''}another --init"
        )
    args = flags.complete(args, inherited=start["args"])
    # A retrained stage 1, or one that has gone on, is another start: not resumed from.
    args.init_run_id, args.init_step = start["run_id"], start["step"]
    args.first_epoch = start["args"]["epochs"]
    state = "complete" if start["complete"] else "NOT complete"
    if "T" in first and str(args.word2vec) != str(start["args"]["word2vec"]):
        raise SystemExit(
            f"--word2vec {args.word2vec}: the text encoder of {args.init} was "
            f"trained on {start['args']['word2vec'] or 'vectors of its own'}; "
            "leave it out"
        )
    say(f"starting from {args.init} ({first}, step {start['step']}, {state})")

    # ------------------------------------------------------------------------------- run, data
    modalities = first + args.add
    demo = "-demo" if args.demo else ""
    folder = args.out or Path("runs") / f"stage2-{first}_{args.add}{demo}"
    if args.dry_run:
        folder = dry_run.begin(args, folder)
    training.check_gensim(args, args.init, folder)
    store = training.open_store(args, modalities)
    training.check_widths(store, start["sizes"], "--data")
    resumed = checkpoint.open_run(folder, flags.as_dict(args), args.resume)
    words = training.open_words(args, store, args.init, folder, bool(resumed))

    # ------------------------------------------------------------------------ model, objective
    torch.manual_seed(args.seed)
    recon_dim = args.recon_dim if args.recon_weight else 0
    sizes = start["sizes"] | {"modalities": modalities, "recon_dim": recon_dim}
    if "V" not in first:
        sizes["video_dims"] = training.video_dims(store)
    if "T" not in first:
        sizes["word_dim"] = words.dim
    model = MCN(**sizes).to(device)
    known = model.state_dict().keys() & start["model"].keys()  # reconstruction heads may come or go
    model.load_state_dict({key: start["model"][key] for key in known}, strict=False)
    frozen = args.stage1_encoders == "frozen"
    if frozen:
        model.freeze(MODALITIES[m] for m in first)
    objective = training.objective_of(
        args, modalities, trained=args.add if frozen else modalities, first=first
    )
    run = training.Training(args, folder, store, words, model, objective, device, resumed)
    hint = "Next: python evaluate.py --youcook2" + (f" --run {folder}" if args.out else "")
    if run.done:
        run.say_done(hint)
        return distributed.finish()

    if args.detect is not None:
        run.detect()
        return distributed.finish()

    # ----------------------------------------------------------------------------------- train
    model.train()
    for epoch in run.epochs():
        for batch in run.batches(epoch):
            with run.autocast():
                embeddings, errors = run.net(batch)
            terms = objective(embeddings, errors, batch)  # fp32, over the global batch
            run.update(terms["total"])  # or skip the step, and say why
            run.log(epoch, terms)
        run.save(epoch)
    run.finish(hint)
    distributed.finish()


if __name__ == "__main__":
    flags.run(main)
