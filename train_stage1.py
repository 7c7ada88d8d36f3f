"""Stage 1: align one pair of modalities from scratch (AVT: all three, the one-stage baseline).

    python train_stage1.py --pair AV                        # a GPU if there is one, else the CPU
    torchrun --nproc_per_node 4 train_stage1.py --pair AV   # four GPUs (or four CPU processes)
    python train_stage1.py --pair VT --data my.h5 --word2vec GoogleNews-vectors-negative300.bin

Without data/howto100m.h5 it trains on the demo data. The same command again resumes.
"""

import argparse
from pathlib import Path

from mcn_ext.train import flags


def get_args(argv=None):
    parser = flags.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pair",
        type=flags.pair,
        required=True,
        metavar="|".join(flags.PAIRS),
        help="modalities to align: A audio, V video, T text",
    )
    flags.add_training_flags(parser, stage=1)
    return flags.complete(parser.parse_args(argv))


def main(argv=None):
    args = get_args(argv)  # torch is not loaded yet

    import torch

    from mcn_ext import distributed
    from mcn_ext.model import MCN
    from mcn_ext.train import checkpoint, dry_run, training

    # ------------------------------------------------------------------------------- run, data
    device = distributed.init(args.device)
    args.n_ranks = distributed.world()
    folder = args.out or Path("runs") / f"stage1-{args.pair}{'-demo' if args.demo else ''}"
    if args.dry_run:
        folder = dry_run.begin(args, folder)
    if "T" in args.pair:
        training.check_gensim(args, None, folder)
    store = training.open_store(args, args.pair)
    resumed = checkpoint.open_run(folder, flags.as_dict(args), args.resume)
    words = None
    if "T" in args.pair:
        words = training.open_words(args, store, None, folder, bool(resumed))

    # ------------------------------------------------------------------------ model, objective
    torch.manual_seed(args.seed)
    model = MCN(
        args.pair,
        video_dims=training.video_dims(store),
        word_dim=words.dim if words else 300,
        embd_dim=args.embd_dim,
        recon_dim=args.recon_dim if args.recon_weight else 0,
        audio_width=args.audio_width,
    ).to(device)
    objective = training.objective_of(args, args.pair, trained=args.pair)
    run = training.Training(args, folder, store, words, model, objective, device, resumed)
    missing = [m for m in "AVT" if m not in args.pair]
    next_script = f"train_stage2.py --add {missing[0]}" if missing else "evaluate.py --youcook2"
    where = f" --{'init' if missing else 'run'} {folder}" if args.out else ""
    hint = f"Next: python {next_script}{where}"
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
