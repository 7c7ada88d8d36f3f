"""Stage 2: add the third modality to the pair that stage 1 aligned.

    python train_stage2.py --add T                          # from the newest stage-1 run in runs/
    torchrun --nproc_per_node 4 train_stage2.py --add T     # four GPUs (or four CPU processes)
    python train_stage2.py --add V --init runs/stage1-AT --stage1_encoders finetune
    python train_stage2.py --add T --max_steps 20           # a trial

Data, objective and batches are stage 1's by default (INHERITED below). To resume after an
interruption, run the same command again. The run folder, runs/stage2-AV_T, holds the same files as
stage 1's.
"""

import argparse
import contextlib
import math
import time
from pathlib import Path

from mcn_ext.train import flags

# ------------------------------------------------------------------------------------------ flags
# The demo preset, where the run that stage 2 starts from does not say (published weights do not).
DEMO = dict(
    batch_size=16,
    n_pair=8,
    lr=2e-3,
    audio_frames=300,
    min_time=1.0,
    cluster_size=64,
    temperature=0.1,
    cluster_weight=0.3,
    recon_weight=5.0,
)
# Taken from the run that stage 2 starts from, unless given: the data, and all that makes the stages
# comparable.
INHERITED = (
    "data",
    "word2vec",
    "audio",
    "text",
    "preset",
    "n_pair",
    "min_time",
    "audio_frames",
    "audio_augment",
    "loss",
    "n_candidates",
    "temperature",
    "learn_temperature",
    "margin",
    "similarity",
    "cluster_weight",
    "cluster_size",
    "queue_size",
    "recon_weight",
    "batch_size",
    "lr",
    "precision",
    "seed",
)


def get_parser():
    parser = flags.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    switch = argparse.BooleanOptionalAction
    positive, not_negative = flags.positive, flags.not_negative

    add = parser.add_argument_group("data").add_argument
    add(
        "--add",
        type=flags.letter,
        required=True,
        metavar="|".join(flags.MODALITIES),
        help="modality to add: A audio, V video, T text",
    )
    add("--init", type=Path, help="stage-1 run folder (the newest in runs/ that lacks --add)")
    add("--data", type=Path, help="store or folder of shards (stage 1's)")
    add(
        "--word2vec",
        type=Path,
        help="word vectors of word2vec, GloVe, fastText, gensim (.kv) or a "
        "run's words.npz (stage 1's, else data/word2vec.bin; without one, vectors are trained on "
        "the captions)",
    )
    add("--preset", choices=("paper", "features", "demo"), help="sizes (stage 1's)")
    add(
        "--audio",
        type=flags.streams,
        default="davenet",
        help="davenet, or names of the store's audio streams, with commas between (stage 1's)",
    )
    add(
        "--text",
        default="words",
        help="words, or the name of the store's caption features (stage 1's)",
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
        "--stage1_encoders",
        choices=("frozen", "finetune"),
        default="frozen",
        help="frozen: only the new encoder learns; finetune: all three pairs are trained",
    )
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
    add("--epochs", type=positive(int), default=10)
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
    add("--out", type=Path, help="run folder (runs/stage2-PAIR_ADDED)")
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


def get_args(argv=None, start=None):
    """``start``: the flags of the run that stage 2 starts from, which become defaults, and its
    "modalities"."""
    parser = get_parser()
    args = parser.parse_args(argv)
    if start is None:
        return args
    # These become defaults: parsing again applies them where the user gave no value.
    inherited = {name: start[name] for name in INHERITED if start.get(name) is not None}
    if args.text != "words":
        inherited.pop("word2vec", None)  # of stage 1, which may have had no text
    preset = args.preset or inherited["preset"]
    if preset != inherited["preset"]:
        raise SystemExit(
            f"--preset {preset}: {args.init} was trained with {inherited['preset']}, whose sizes "
            "stage 2 keeps; leave it out, and give what shall differ, such as --batch_size"
        )
    parser.set_defaults(**((DEMO if preset == "demo" else {}) | inherited))
    args = parser.parse_args(argv)
    if args.similarity != start["similarity"]:  # the other one has another scale
        parser.set_defaults(temperature=1.0 if args.similarity == "dot" else 0.05)
        args = parser.parse_args(argv)
    if args.loss != start.get("loss", "softmax"):  # the other one's are of no use to it
        parser.set_defaults(n_candidates=None)
        args = parser.parse_args(argv)
    args.word2vec = Path(args.word2vec) if args.word2vec else None
    args.data, args.preset, args.demo = flags.find_data(Path(args.data), preset)
    flags.check(args, own_words="T" not in start["modalities"])
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
    from mcn_ext.modalities import MODALITIES
    from mcn_ext.model import MCN
    from mcn_ext.objective import Objective
    from mcn_ext.train import checkpoint, inputs, memory
    from mcn_ext.train.curves import curves
    from mcn_ext.train.diagnostics import diagnose, signs_of_collapse
    from mcn_ext.train.guard import Guard
    from mcn_ext.train.log import RunLog, say
    from mcn_ext.train.signals import StopRequest

    # ------------------------------------------------------------------- the run to start from
    demo = flags.real_data() is None  # else a demo run is never the default
    init = args.init or checkpoint.find_run(Path("runs"), stage=1, lacks=args.add, demo=demo)
    if init is None:
        raise inputs.no_start(args.add)
    start = checkpoint.load(init / checkpoint.LATEST)
    pair = start["sizes"]["modalities"]
    inputs.check_added(args.add, pair, init)
    # Stage 2 begins with the temperature and the bias that stage 1 has learnt.
    learnt = start.get("training", {}).get("objective", {})
    if "log_scale" in learnt:
        start["args"]["temperature"] = round(math.exp(-float(learnt["log_scale"])), 6)
    args = get_args(argv, start["args"] | {"modalities": pair})
    # A retrained stage 1, or one that has gone on, is another start: not resumed from.
    args.init, args.init_run_id, args.init_step = init, start["run_id"], start["step"]
    args.first_epoch = start["args"].get("first_epoch", 0) + start["args"]["epochs"]
    inputs.check_inputs(args, start["args"], pair)
    modalities = pair + args.add

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
    name = f"stage2-{pair}_{args.add}{'-demo' if args.demo else ''}"
    folder = args.out or Path("runs") / name
    with_words = "T" in modalities and args.text == "words"
    if with_words:
        inputs.check_gensim(args, init, folder)
    store = inputs.open_store(args, modalities, start["sizes"])
    # A run goes on with the data that it began with.
    inputs.identify(args, store, modalities, start["args"])
    inputs.check_batch_size(args, store)
    checkpoint.lock(folder)  # one run at a time in a folder
    resumed = checkpoint.open_run(folder, flags.as_dict(args), args.resume)  # None: a new run
    words = inputs.open_words(args, store, init, folder, bool(resumed)) if with_words else None
    word_vectors = torch.from_numpy(words.vectors).to(device) if words else None
    reader = ClipReader(
        store,
        modalities,
        video_streams=start["sizes"]["video_dims"] if "V" in pair else None,
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
    # Clips go on where stage 1 ended: in epochs that it has not drawn. (An old run goes on with
    # those that it had.)
    if resumed:
        args.first_epoch = resumed["args"].get("first_epoch", 0)
    sampler = ClipSampler(len(clips), args.batch_size, args.seed, args.first_epoch)
    loader = make_loader(clips, sampler, workers, device)
    n_clips = args.batch_size * args.n_pair
    sample = inputs.read_sample(clips)  # what the checks before the first step look at
    inputs.check_content(sample, store, words, refuse=not resumed)
    memory.check_shared_memory(sample, n_clips // world, workers)

    # ------------------------------------------------------------------------ model and objective
    # All ranks draw the same initial weights. Their later random numbers differ, see below.
    torch.manual_seed(args.seed)
    sizes = start["sizes"] | {"modalities": modalities}
    # Not from sizes, which have 0 if stage 1 had no reconstruction loss.
    recon_dim = start["args"].get("recon_dim", sizes["recon_dim"])
    sizes["recon_dim"] = recon_dim if args.recon_weight else 0
    # What stage 1's encoders read stays; of the added one it is new.
    if args.add == "V":
        sizes["video_dims"] = store.streams("V")
    elif args.add == "A":
        sizes["audio_dims"] = {name: store.dims[name] for name in reader.audio_streams}
    elif args.add == "T":
        sizes["text"] = args.text
        sizes["word_dim"] = words.dim if words else store.text_dims[args.text]
    model = MCN(**sizes, checkpoint_activations=args.checkpoint_activations).to(device)
    known = model.state_dict().keys() & start["model"].keys()  # reconstruction heads come or go
    weights = {key: start["model"][key] for key in known}
    # Not strict: the start run has no weights for the modality that is added.
    checkpoint.load_weights(init, model, weights, strict=False)
    frozen = args.stage1_encoders == "frozen"
    if frozen:
        model.freeze(MODALITIES[letter].name for letter in pair)
    model.train()
    objective = Objective(  # contrastive + clustering + reconstruction, over the global batch
        model.modalities,
        trained=[MODALITIES[args.add].name] if frozen else model.modalities,
        loss=args.loss,
        bias=float(learnt.get("bias", -math.log(n_clips))),
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

    hint = flags.next_command(folder, modalities, named=bool(args.out))
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
        f"{folder}: {'resumed' if resumed else f'from {init}'}, step {step} of {total_steps} "
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
