"""Stage 1: align one pair of modalities from scratch (AVT: all three, the one-stage baseline).

    python train_stage1.py --pair AV                        # a GPU if there is one, else the CPU
    torchrun --nproc_per_node 4 train_stage1.py --pair AV   # four GPUs (or four CPU processes)
    python train_stage1.py --pair VT --data my.h5 --word2vec GoogleNews-vectors-negative300.bin
    python train_stage1.py --pair AV --audio beats,clap --preset features   # of frozen encoders
    python train_stage1.py --pair AV --preset demo --max_steps 20       # a trial

Without data/howto100m.h5 it trains on generated demo data. To resume after an interruption, run the
same command again. The run folder, runs/stage1-AV, gets checkpoint.pt, epoch-NN.pt, log.jsonl (one
row of losses and diagnostics every --log_every steps), curves.png, args.json and env.txt.
"""

import argparse
import contextlib
import math
import time
from pathlib import Path

from mcn_ext.train import flags

# ------------------------------------------------------------------------------------------ flags
PRESETS = {
    "paper": {},
    "features": dict(batch_size=512, embd_dim=1024),  # no encoder but the gated units to train
    "demo": dict(  # small, for two CPU cores
        batch_size=16,
        n_pair=8,
        lr=2e-3,
        embd_dim=256,
        recon_dim=128,
        audio_width=0.125,
        audio_frames=300,
        min_time=1.0,
        cluster_size=64,
        temperature=0.1,
        cluster_weight=0.3,
        recon_weight=5.0,
    ),
}


def get_parser():
    """The defaults are the published experiment's sizes, weights and schedule. Similarity and
    temperature are not: the published objective is --similarity dot."""
    parser = flags.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    switch = argparse.BooleanOptionalAction
    positive, not_negative = flags.positive, flags.not_negative

    add = parser.add_argument_group("data").add_argument
    add(
        "--pair",
        type=flags.pair,
        required=True,
        metavar="|".join(flags.PAIRS),
        help="modalities to align: A audio, V video, T text",
    )
    add(
        "--data",
        type=Path,
        help="store, folder of shards, or demo: generated data (data/howto100m.h5, else demo)",
    )
    add(
        "--word2vec",
        type=Path,
        help="word vectors of word2vec, GloVe, fastText, gensim (.kv) or a "
        "run's words.npz (data/word2vec.bin; without one, vectors are trained on the captions)",
    )
    add(
        "--preset",
        choices=PRESETS,
        help="sizes; features: for --audio NAME; demo: small, for a CPU (demo for the demo data, "
        "else paper)",
    )
    add(
        "--audio",
        type=flags.streams,
        default="davenet",
        help="davenet: its encoder learns from spectrograms; or names of the store's audio streams,"
        " with commas between: features of a frozen encoder",
    )
    add(
        "--text",
        default="words",
        help="words: their vectors; or the name of the store's caption features",
    )
    add(
        "--n_pair",
        type=positive(int),
        default=32,
        help="clips per video and step; lower it when videos have few captions",
    )
    add(
        "--min_time",
        type=not_negative(float),
        default=10.0,
        help="shortest clip in seconds; lower it for short videos",
    )
    add(
        "--audio_frames",
        type=positive(int),
        default=1000,
        help="longest sound of a clip, in frames of 10 ms; memory and time grow with it",
    )
    add(
        "--audio_augment",
        type=not_negative(float),
        default=0.0,
        help="strength of random changes "
        "of voice, pace and room; try 1 when there are few speakers",
    )
    add(
        "--workers",
        type=not_negative(int),
        help="reading processes per rank (up to 8 with a GPU, "
        "0 on a CPU); raise it when data_wait in log.jsonl is not near 0",
    )

    add = parser.add_argument_group("model").add_argument
    add(
        "--embd_dim",
        type=positive(int),
        default=6144,
        help="width of the joint space; the first to lower when memory is short",
    )
    add("--recon_dim", type=positive(int), default=1024, help="width of reconstruction heads")
    add("--audio_width", type=positive(float), default=1.0, help="of DAVEnet; 0.25 for small data")
    add(
        "--checkpoint_activations",
        action=switch,
        default=False,
        help="compute DAVEnet's "
        "activations again in backward: less memory, more time, the same gradients",
    )

    add = parser.add_argument_group("objective").add_argument
    add(
        "--loss",
        choices=flags.LOSSES,
        default="softmax",
        help="contrastive loss; for pairs that do not belong together: milnce takes a clip's "
        "neighbours in time as further positives, dcl leaves positives out of the denominator, "
        "sigmoid asks each pair by itself (SigLIP)",
    )
    add(
        "--n_candidates",
        type=positive(int),
        help="of --loss milnce: neighbouring clips of a batch's video in a bag (4). The published "
        "MIL-NCE reads the nearest captions in addition; here they are clips that are there",
    )
    add(
        "--temperature",
        type=positive(float),
        default=0.05,
        help="of the softmax; higher (0.1) when data is noisy",
    )
    add(
        "--learn_temperature",
        action=switch,
        default=False,
        help="start at --temperature and learn it, as CLIP does",
    )
    add(
        "--margin",
        type=flags.number,
        default=0.001,
        help="subtracted from the positives' similarity",
    )
    add(
        "--similarity",
        choices=("cosine", "dot"),
        default="cosine",
        help="dot: the published objective, at temperature 1; it can diverge",
    )
    add("--cluster_weight", type=not_negative(float), default=1.0, help="0: no clustering loss")
    add("--cluster_size", type=positive(int), default=256, help="number of centroids")
    add(
        "--queue_size",
        type=positive(int),
        default=20,
        help="steps whose features are clustered; also the steps between two k-means fits",
    )
    add("--recon_weight", type=not_negative(float), default=50.0, help="0: no reconstruction loss")

    add = parser.add_argument_group("optimisation").add_argument
    add(
        "--batch_size",
        type=positive(int),
        default=128,
        help="videos per step over ALL ranks; more negatives help, up to what memory holds",
    )
    add("--epochs", type=positive(int), default=20)
    add(
        "--lr",
        type=positive(float),
        default=1e-4,
        help="peak of the schedule; try 1e-3 for small data",
    )
    add(
        "--clip_grad_norm",
        type=positive(float),
        help="try ten times the usual grad_norm in "
        "log.jsonl when the loss has spikes (default: no clipping)",
    )
    add(
        "--precision",
        choices=("fp32", "bf16", "fp16"),
        help="of the encoders; losses and "
        "clustering are always fp32 (bf16 on GPUs that have it, else fp32)",
    )
    add("--max_steps", type=positive(int), help="stop early; the schedule still spans --epochs")

    add = parser.add_argument_group("run").add_argument
    add("--out", type=Path, help="run folder (runs/stage1-PAIR)")
    add("--resume", action=switch, default=True, help="--no-resume moves the old folder aside")
    add("--seed", type=not_negative(int), default=0)
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add(
        "--save_every",
        type=positive(int),
        default=1000,
        help="steps between checkpoints: a kill costs at most these",
    )
    add(
        "--log_every",
        type=positive(int),
        default=10,
        help="steps between rows of log.jsonl; each waits for the GPU",
    )

    return parser


def get_args(argv=None):
    parser = get_parser()
    args = parser.parse_args(argv)
    # --preset and --similarity set defaults of other flags. Parsing again applies these defaults
    # where the user gave no value.
    data, preset, demo = flags.find_data(args.data, args.preset)
    parser.set_defaults(**PRESETS[preset])
    if args.similarity == "dot":
        # A dot product is not bounded by 1, and the published objective has no temperature.
        parser.set_defaults(temperature=1.0)
    args = parser.parse_args(argv)
    args.data, args.preset, args.demo = data, preset, demo
    flags.check(args)
    return args


def main(argv=None):
    # Blocks that both stages have are the same lines in both files; tests/test_flags.py compares.
    args = get_args(argv)  # before torch is imported: --help answers at once

    import torch
    from torch.nn.parallel import DistributedDataParallel

    from mcn_ext import distributed
    from mcn_ext.data.clips import (
        ClipReader,
        ClipSampler,
        TrainingClips,
        default_workers,
        make_loader,
        to_device,
    )
    from mcn_ext.model import MCN
    from mcn_ext.objective import Objective
    from mcn_ext.train import checkpoint, inputs, memory
    from mcn_ext.train.curves import curves
    from mcn_ext.train.diagnostics import diagnose, signs_of_collapse
    from mcn_ext.train.guard import Guard
    from mcn_ext.train.log import RunLog, say
    from mcn_ext.train.signals import StopRequest

    # -------------------------------------------------------------------- processes and precision
    device = distributed.init(args.device)  # torchrun's or srun's rank; one process otherwise
    rank, world = distributed.rank(), distributed.world()
    args.n_ranks = world
    inputs.check_ranks(args)
    # Older GPUs emulate bf16; that does not count as support.
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    precision = args.precision or ("bf16" if bf16 else "fp32")
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]

    def autocast():
        return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()

    # ------------------------------------------------------------------------------- run and data
    folder = args.out or Path("runs") / f"stage1-{args.pair}{'-demo' if args.demo else ''}"
    with_words = "T" in args.pair and args.text == "words"
    if with_words:
        inputs.check_gensim(args, None, folder)
    store = inputs.open_store(args, args.pair)
    inputs.identify(args, store, args.pair)  # a run goes on with the data that it began with
    inputs.check_batch_size(args, store)
    checkpoint.lock(folder)  # one run at a time in a folder
    resumed = checkpoint.open_run(folder, flags.as_dict(args), args.resume)  # None: a new run
    words = inputs.open_words(args, store, None, folder, bool(resumed)) if with_words else None
    word_vectors = torch.from_numpy(words.vectors).to(device) if words else None
    reader = ClipReader(
        store,
        args.pair,
        audio_streams=inputs.audio_streams(args),
        text=args.text,
        words=words,
        audio_frames=args.audio_frames,
        audio_augment=args.audio_augment,
    )
    # A clip depends on (seed, epoch, video) alone: any number of ranks sees the same batch.
    clips = TrainingClips(
        reader,
        n_pair=args.n_pair,
        min_time=args.min_time,
        seed=args.seed,
        n_candidates=args.n_candidates,
    )
    workers = default_workers(device) if args.workers is None else args.workers
    sampler = ClipSampler(len(clips), args.batch_size, args.seed)
    loader = make_loader(clips, sampler, workers, device)
    n_clips = args.batch_size * args.n_pair
    sample = inputs.read_sample(clips)  # what the checks before the first step look at
    inputs.check_content(sample, store, words, refuse=not resumed)
    memory.check_shared_memory(sample, n_clips // world, workers)

    # ------------------------------------------------------------------------ model and objective
    # All ranks draw the same initial weights. Their later random numbers differ, see below.
    torch.manual_seed(args.seed)
    model = MCN(
        args.pair,
        video_dims=store.streams("V"),
        audio_dims={name: store.dims[name] for name in reader.audio_streams},
        text=args.text,
        # Without text the width is not used; stage 2 sets it when it adds text.
        word_dim=words.dim if words else store.text_dims.get(args.text, 300),
        embd_dim=args.embd_dim,
        # No heads without the loss: they would take memory and learn nothing.
        recon_dim=args.recon_dim if args.recon_weight else 0,
        audio_width=args.audio_width,
        checkpoint_activations=args.checkpoint_activations,
    ).to(device)
    model.train()
    objective = Objective(  # contrastive + clustering + reconstruction, over the global batch
        model.modalities,
        trained=model.modalities,
        loss=args.loss,
        # The sigmoid's share of positives at the start; SigLIP's -10 is that of 32,768 clips.
        bias=-math.log(n_clips),
        temperature=args.temperature,
        learn_temperature=args.learn_temperature,
        margin=args.margin,
        similarity=args.similarity,
        cluster_weight=args.cluster_weight,
        recon_weight=args.recon_weight,
        cluster_size=args.cluster_size,
        queue_size=args.queue_size,
        seed=args.seed,
    ).to(device)

    # --------------------------------------------------------------------- optimiser and schedule
    parameters = [p for p in (*model.parameters(), *objective.parameters()) if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=args.lr, fused=True)
    # In fp16 gradients below 3e-8 become 0, so the loss is scaled up. bf16 has the range of fp32.
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    total_steps = args.epochs * sampler.steps_per_epoch
    last_step = min(total_steps, args.max_steps or total_steps)
    warmup_steps = min(1000, math.ceil(total_steps / 10))
    peaks = [group["lr"] for group in optimizer.param_groups]  # a group may have a rate of its own

    def learning_rate(step, peak):  # linear warm-up, then half a cosine down to 0
        if step < warmup_steps:
            return peak * (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return peak * 0.5 * (1 + math.cos(math.pi * progress))

    # A step whose loss or gradient is not finite is undone, explained and counted: see guard.py.
    guard = Guard(model, objective, scaler, folder, describe=reader.describe)

    # -------------------------------------------------------------------------- resume and save
    torch.manual_seed(args.seed + rank)  # dropout and the like: ranks differ
    step, run_id = 0, checkpoint.new_run_id()
    if resumed:
        step, run_id, state = resumed["step"], resumed["run_id"], resumed["training"]
        checkpoint.load_weights(folder, model, resumed["model"])
        checkpoint.load_optimizer(folder, optimizer, state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        guard.load_state_dict(state["guard"])
        objective.load_training_state(state, device)
        checkpoint.set_random_state(state["rng"], device)

    def save(epoch_done=None):  # all ranks call this; rank 0 writes, atomically
        checkpoint.save(
            folder,
            args=flags.as_dict(args),
            sizes=model.sizes,
            step=step,
            run_id=run_id,
            epoch_done=epoch_done,
            complete=step >= total_steps,
            model=model.state_dict(),
            training={
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "guard": guard.state_dict(),
                **objective.training_state(),
                "rng": checkpoint.random_states(device),
            },
        )

    hint = flags.next_command(folder, args.pair, named=bool(args.out))
    if step >= last_step:
        if rank == 0 and not (folder / "curves.png").exists():  # killed before it was drawn
            curves(folder)
        longer = "raise or leave out --max_steps"
        if step >= total_steps:
            longer = "start a run with more --epochs and another --out"
        say(
            f"{folder} is at step {step} of {total_steps}: nothing to do. To train longer, "
            f"{longer}. {hint}"
        )
        return distributed.finish()
    if device.type == "cpu":
        memory.check(model, sample, n_clips // world, word_vectors)

    # ------------------------------------------------------------------------------ several ranks
    net = model
    if world > 1:
        net = DistributedDataParallel(model)
        if device.type == "cpu":  # gloo adds up in an order that a resumed run would not repeat
            net.register_comm_hook(None, distributed.mean_in_rank_order)
    log = RunLog(folder, flags.as_dict(args), device, step, total_steps)
    stop = StopRequest()  # SIGTERM, SIGINT and SIGUSR1 end the run after a step, and save it
    say(
        f"{folder}: {'resumed' if resumed else 'new run'}, step {step} of {total_steps} "
        f"({args.epochs} epochs x {sampler.steps_per_epoch}), {len(clips)} videos of {args.data}\n"
        f"  a step: {args.batch_size} videos x {args.n_pair} clips = {n_clips} clips on {world} "
        f"rank(s), {precision}, {device}; {sum(p.numel() for p in parameters) / 1e6:.1f} M "
        "parameters learn"
    )
    inputs.warn_of_clusters(objective, n_clips, total_steps)

    # -------------------------------------------------------------------------------------- train
    stopped = False
    while step < last_step and not stopped:
        epoch = step // sampler.steps_per_epoch + 1
        waiting = time.perf_counter()
        # A resumed run may begin within an epoch: it skips the batches that it has trained on.
        sampler.set_epoch(epoch, start=step % sampler.steps_per_epoch)
        for batch in loader:
            log.waited += time.perf_counter() - waiting
            batch = to_device(batch, device, word_vectors)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                # Skipped steps do not move the schedule.
                group["lr"] = learning_rate(step - guard.skipped, peak)
            guard.remember()  # BatchNorm's statistics, should the step be undone

            with autocast():
                embeddings, errors = net(batch)
            terms = objective(embeddings, errors, batch)  # fp32, over the global batch
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(terms.total).backward()
            distributed.average_gradients(objective.parameters())  # DDP does the model's
            step += 1

            # Unscaled first: check, clipping and log need the norm of the true gradient.
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            why, stopped = guard.check(terms.total, norm, stop.requested)  # the same on all ranks
            if why:  # no optimiser step; skip() restores BatchNorm and the scaler
                row = guard.skip(step, why, terms, flags.as_dict(args))
                log.skipped(step, epoch, n_clips, row)
                guard.give_up(step)
            else:
                if args.clip_grad_norm:
                    torch.nn.utils.clip_grads_with_norm_(parameters, args.clip_grad_norm, norm)
                scaler.step(optimizer)
                scaler.update()
                objective.limit_temperature()
                log.count(step, n_clips)
                if step % args.log_every == 0 or step == last_step:
                    row = {
                        "step": step,
                        "epoch": epoch,
                        "lr": max(group["lr"] for group in optimizer.param_groups),
                    }
                    more = {"grad_norm": guard.norm, "skipped_steps": guard.skipped}
                    more |= objective.statistics() | objective.parts(terms)
                    more |= diagnose(objective, terms)
                    log.write(row, terms.scalars(), more)
                    if step > warmup_steps:  # new encoders map everything to much the same
                        log.warn_once(step, signs_of_collapse(more))
                objective.update_clusters(terms)  # into the queue; k-means when due

            # Leaves before the save below: the one after the loop would write this step again.
            if step >= last_step or stopped or step % sampler.steps_per_epoch == 0:
                break
            if step % args.save_every == 0:
                save()
            waiting = time.perf_counter()
        save(epoch_done=epoch if step % sampler.steps_per_epoch == 0 else None)

    log.close()
    if stopped and step < last_step:  # end() leaves the program
        stop.end(f"{folder} is saved at step {step} of {total_steps}; run the same command again")
    if rank == 0:
        curves(folder)
        say(f"{folder}: step {step} of {total_steps}, curves in {folder / 'curves.png'}. {hint}")
    distributed.barrier()
    distributed.finish()


if __name__ == "__main__":
    flags.run(main)
