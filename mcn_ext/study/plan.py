"""Which pair first? Trains every order of the modalities and the one-stage baseline, several seeds,
and compares them.

    python -m mcn_ext.study --data data/howto100m.h5 --youcook2 data/youcook2.h5 --out runs/study
    python -m mcn_ext.study --predict            # only what raw features say, in seconds
    python -m mcn_ext.study --print              # only print the commands, one chain of runs a line
    python -m mcn_ext.study --print slurm        # print an sbatch script, one array task a chain
    python -m mcn_ext.study --noise 0.5 1 2      # demo data, video noise x audio noise
    python -m mcn_ext.study --noise 0.5 2 --shift 0 0.4    # x share of misaligned clips

Orders: AV_T (audio and video first, then text), VT_A, AT_V. AVT trains all three in one stage, for
as many steps as an order (equal steps) and for as many as cost the same (equal compute, in FLOPs).
All other flags are train_stage1.py's, and the same for all runs. To resume after an interruption,
run the same command again; runs that were made elsewhere from --print's list are used as they are.
The result is report.html in --out.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import shlex
import subprocess
import sys
from pathlib import Path

from mcn_ext.study import run
from mcn_ext.study.cost import BASELINE, clips_and_inputs, training_flops
from mcn_ext.train import flags

ROOT = Path(__file__).resolve().parents[2]
ORDERS = ("AV_T", "VT_A", "AT_V")
# Flags that change the objective: a variant with one of them gets a baseline of its own.
OBJECTIVE = (
    "loss n_candidates temperature learn_temperature margin similarity cluster_weight "
    "recon_weight cluster_size queue_size"
).split()
STAGE1_ONLY = "embd_dim recon_dim audio_width".split()
SET_BY_STUDY = "pair add init data out seed resume max_steps".split()


def get_parser() -> argparse.ArgumentParser:
    parser = flags.Parser(
        prog="python -m mcn_ext.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, positive = parser.add_argument, flags.positive
    add("--data", type=Path, help="training store (data/howto100m.h5, else the demo data)")
    add("--youcook2", type=Path, help="evaluation store (data/youcook2.h5, or the demo's)")
    add("--out", type=Path, default=Path("runs/study"), help="folder of runs and report")
    add(
        "--orders",
        nargs="+",
        choices=(*ORDERS, BASELINE),
        default=[*ORDERS, BASELINE],
        help="default: all three, and the one-stage baseline AVT",
    )
    add("--seeds", nargs="+", type=flags.not_negative(int), default=[0, 1, 2], help="(0 1 2)")
    add(
        "--stage1_encoders",
        nargs="+",
        choices=("frozen", "finetune"),
        default=["frozen", "finetune"],
        help="what stage 2 does with the encoders of stage 1 (both)",
    )
    add(
        "--variant",
        action="append",
        default=[],
        metavar="NAME=FLAGS",
        help="one more kind of stage 2, by train_stage2.py's flags, such as "
        "gentle='--stage1_encoders finetune --lr 1e-5'; may be repeated",
    )
    add(
        "--baselines",
        nargs="+",
        choices=("steps", "compute"),
        default=["steps", "compute"],
        help="AVT for as many steps as an order, for as many FLOPs as each order (both)",
    )
    add(
        "--epochs",
        nargs=2,
        type=positive(int),
        default=[20, 10],
        metavar=("FIRST", "SECOND"),
        help="of stage 1 and stage 2 (20 10)",
    )
    add(
        "--noise",
        nargs="+",
        type=flags.between(float, *flags.NOISE),
        help="instead of --data, demo data with each level of video noise and each of audio "
        "noise; 0 is clean, 1 the demo's",
    )
    add(
        "--shift",
        nargs="+",
        type=flags.between(float, 0, 1),
        default=[0.0],
        help="of --noise's data: each share of clips whose sound or picture is a neighbour's (0)",
    )
    add("--videos", type=positive(int), default=256, help="training videos of --noise's data (256)")
    add("--jobs", type=positive(int), default=1, help="chains at a time; they share the cores (1)")
    add(
        "--keep_epochs",
        action="store_true",
        help="keep epoch-NN.pt of evaluated runs; by default only checkpoint.pt, the last, is kept",
    )
    add(
        "--launch",
        default="",
        help="put before the training scripts, such as 'torchrun --nproc_per_node 4'",
    )
    add(
        "--predict",
        action="store_true",
        help="only say, in seconds, which pair the data's raw features would put first",
    )
    add(
        "--print",
        nargs="?",
        const="lines",
        choices=("lines", "slurm"),
        dest="show",
        help="print the commands, one chain a line, or an sbatch script; run nothing",
    )
    return parser


def by_flag(words: list[str]) -> dict[str, list[str]]:
    """The words of a command line as {flag: [flag, value, ...]}, the last of each flag."""
    groups: list[list[str]] = []
    for word in words:
        if word.startswith("--"):
            groups.append(word.split("=", 1))
        elif groups:
            groups[-1].append(word)
    return {g[0].lstrip("-").replace("-", "_").removeprefix("no_"): g for g in groups}


def stage_args(stage: int, words: list[str]) -> argparse.Namespace:
    """The training script's arguments; it exits if a flag is wrong, before any work is done."""
    file = ROOT / f"train_stage{stage}.py"
    spec = importlib.util.spec_from_file_location(file.stem, file)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    required = ["--pair", BASELINE] if stage == 1 else ["--add", "T"]
    return script.get_args(required + words)


def check_flags(words: list[str], where: str = "") -> None:
    if taken := [name for name in SET_BY_STUDY if name in by_flag(words)]:
        raise SystemExit(f"{where}--{taken[0]}: the study sets it for each of its runs")


def prepare_demo(folder: Path, *words) -> None:
    """Make demo data, unless they are there."""
    command = [sys.executable, "-m", "mcn_ext.prepare", "demo", "--out", folder, *words]
    made = subprocess.run(list(map(str, command)), stdout=sys.stderr, check=False)
    if made.returncode:
        raise SystemExit(made.returncode)


def get_cells(args: argparse.Namespace, settings: argparse.Namespace) -> list[dict]:
    """The data sets: one, or the cells of the noise grid."""
    if not args.noise:
        if any(args.shift):
            raise SystemExit("--shift: misaligns the data that --noise makes; give --noise 1")
        data, store = settings.data, args.youcook2
        if settings.demo:
            prepare_demo(data.parent)
        store = store or (data.parent / "eval.h5" if settings.demo else flags.STORES["youcook2"])
        return [{"name": "", "data": str(data), "youcook2": str(store)}]
    if args.data or args.youcook2:
        raise SystemExit("--noise makes data of its own: leave out --data and --youcook2")
    cells, levels = [], dict.fromkeys(args.noise)
    for video, audio, shift in itertools.product(levels, levels, dict.fromkeys(args.shift)):
        name = f"v{video:g}-a{audio:g}" + (f"-s{shift:g}" if shift else "")
        folder = args.out / "data" / name
        dials = {"video_noise": video, "audio_noise": audio, "shift": shift}
        words = [word for dial, value in dials.items() for word in (f"--{dial}", value)]
        prepare_demo(folder, *words, "--videos", args.videos)
        paths = {"data": str(folder / "train.h5"), "youcook2": str(folder / "eval.h5")}
        cells.append({"name": name, **paths, **dials})
    return cells


def get_methods(args, settings, variants: dict[str, str], clips: int, inputs: dict) -> list[dict]:
    """What is compared: entries of study.json, but for the seed, the cell and the folders. "flags"
    are those of the method's last stage."""
    first = args.epochs[0]
    joint = clips * training_flops(settings, inputs, BASELINE)
    methods: list[dict] = []
    baselines: dict[tuple, dict] = {}
    for order in [order for order in ORDERS if order in args.orders]:
        pair, third = order.split("_")
        stage1 = clips * training_flops(settings, inputs, pair)
        frozen_epoch = clips * training_flops(settings, inputs, pair + third, frozen=pair)
        for variant, words in variants.items():
            words = shlex.split(words)
            stage2 = stage_args(2, ["--epochs", str(args.epochs[1]), *words])
            frozen, total = stage2.stage1_encoders == "frozen", first + stage2.epochs
            name = order + (f"-{variant}" if variant else "")
            flops = first * stage1 + stage2.epochs * (frozen_epoch if frozen else joint)
            methods.append(
                {
                    "method": name,
                    "order": order,
                    "encoders": "frozen" if frozen else "finetune",
                    "epochs": [first, stage2.epochs],
                    "label": f"{pair} then {third}, {variant or 'frozen'}",
                    "flops": flops,
                    "flags": words,
                }
            )
            objective = [w for n, group in by_flag(words).items() if n in OBJECTIVE for w in group]
            same = max(1, round(flops / joint))
            if abs(same - total) <= 0.05 * same:
                same = total  # another baseline of nearly as many epochs would say nothing new
            for kind, epochs in {"steps": total, "compute": same}.items():
                if kind not in args.baselines:
                    continue
                for of in ("", variant) if objective else ("",):
                    entry = baselines.setdefault((epochs, of), {"steps": [], "compute": []})
                    entry[kind].append(name)
                    entry["flags"] = objective if of else []
    for (epochs, variant), entry in baselines.items() if BASELINE in args.orders else ():
        methods.append(
            {
                "method": f"{BASELINE}-{epochs}" + (f"-{variant}" if variant else ""),
                "order": BASELINE,
                "encoders": None,
                "epochs": [epochs],
                "steps_of": entry["steps"],
                "baseline_of": entry["compute"],
                "label": f"one stage, {epochs} epoch{'s' * (epochs > 1)}"
                + (f", {variant}" if variant else ""),
                "flops": epochs * joint,
                "flags": entry["flags"],
            }
        )
    return methods


def get_chains(args, methods: list[dict], cells: list[dict], rest: list[str], device: str):
    """(chains of (run folder, its commands), entries of study.json); chains are independent."""
    launch = shlex.split(args.launch) or [sys.executable]
    stage2_rest = [w for n, group in by_flag(rest).items() if n not in STAGE1_ONLY for w in group]
    chains, entries = [], []

    def train_and_evaluate(cell: dict, folder: Path, stage: int, *words) -> tuple[Path, list]:
        train = [*launch, ROOT / f"train_stage{stage}.py", *words, "--out", folder]
        evaluate = [sys.executable, ROOT / "evaluate.py", "--youcook2", cell["youcook2"]]
        evaluate += ["--run", folder, "--all_directions", "--fusion", "sum", "mean", "bank"]
        evaluate += ["--keep_embeddings", "--require_complete", "--device", device]
        return folder, [list(map(str, train)), list(map(str, evaluate))]

    for cell, seed in itertools.product(cells, dict.fromkeys(args.seeds)):
        where = Path(cell["name"]) / f"seed{seed}"
        common = ["--data", cell["data"], "--seed", seed, *rest]
        for order, group in itertools.groupby(methods, key=lambda method: method["order"]):
            chain, pair = [], order.split("_")[0]
            start = where / f"stage1-{pair}"
            for method in group:
                folder = where / method["method"]
                if order == BASELINE:
                    epochs = ["--epochs", *method["epochs"]]
                    words = ["--pair", pair, *common, *epochs, *method["flags"]]
                    chains.append([train_and_evaluate(cell, args.out / folder, 1, *words)])
                else:
                    folder = where / f"stage2-{method['method']}"
                    first, second = method["epochs"]
                    if not chain:
                        words = ["--pair", pair, *common, "--epochs", first]
                        chain.append(train_and_evaluate(cell, args.out / start, 1, *words))
                        chains.append(chain)
                    words = ["--add", order[-1], "--init", args.out / start, *stage2_rest]
                    words += ["--epochs", second, *method["flags"]]
                    chain.append(train_and_evaluate(cell, args.out / folder, 2, *words))
                stage1 = str(start) if chain else None
                entry = {"cell": cell["name"], "seed": seed, "run": str(folder), "stage1": stage1}
                entries.append(entry | {k: v for k, v in method.items() if k != "flags"})
    return chains, entries


def write_json(out: Path, given: dict, variants: dict[str, str], **content) -> None:
    """study.json; SystemExit if the folder holds a study with other flags."""
    from mcn_ext.train.checkpoint import FREE_FLAGS
    from mcn_ext.train.log import write_text

    file = out / "study.json"
    given = {k: str(v) for k, v in sorted(given.items()) if k not in FREE_FLAGS}
    now = given | {f"variant {name}": words for name, words in variants.items()}
    if file.exists():
        try:
            old = json.loads(file.read_text())
            before = old["flags"] | {f"variant {n}": words for n, words in old["variants"].items()}
        except (ValueError, KeyError, TypeError):
            raise SystemExit(f"{file} is not a study's; give another --out") from None
        other = [
            f"--{name} {before[name]} (now {value})"
            for name, value in now.items()
            if str(before.get(name, value)) != value
        ]
        if other:
            raise SystemExit(
                f"{out} holds a study with {', '.join(other)}; give the same flags, or "
                "another --out"
            )
    out.mkdir(parents=True, exist_ok=True)
    content = {"format": "mcn-study", "version": 1, "flags": given, "variants": variants} | content
    write_text(file, json.dumps(content, indent=1) + "\n")


def main(argv=None) -> int:
    words = sys.argv[1:] if argv is None else list(argv)
    args, rest = get_parser().parse_known_args(words)
    variants = {"": "--stage1_encoders frozen", "finetune": "--stage1_encoders finetune"}
    variants = {n: v for n, v in variants.items() if (n or "frozen") in args.stage1_encoders}
    for text in args.variant:
        name, equals, variants[name] = text.partition("=")
        if not name.isidentifier() or not equals:
            raise SystemExit(f"--variant {text}: write NAME=FLAGS, the name in letters")
        check_flags(shlex.split(variants[name]), f"--variant {name}: ")
    check_flags(rest)
    if args.noise and "preset" not in by_flag(rest):
        rest += ["--preset", "demo"]
    settings = stage_args(1, rest + (["--data", str(args.data)] if args.data else []))
    cells = get_cells(args, settings)
    settings = stage_args(1, [*rest, "--data", cells[0]["data"]])
    if not args.show:
        from mcn_ext.study.predict import with_probes

        cells = with_probes(cells, settings, args.out / "study.json")
    if args.predict:
        return 0
    methods = get_methods(args, settings, variants, *clips_and_inputs(cells[0], settings))
    chains, entries = get_chains(args, methods, cells, rest, settings.device)
    if args.show:
        lines = [" && ".join(shlex.join(c) for _, two in chain for c in two) for chain in chains]
        gpus = int(by_flag(shlex.split(args.launch)).get("nproc_per_node", ["", 1])[1])
        text = "\n".join(lines)
        if args.show == "slurm":
            text = run.SLURM.format(n=len(lines), gpus=gpus, cpus=8 * gpus, chains=text).strip()
        print(text)
        return 0
    command = shlex.join(["python", "-m", "mcn_ext.study", *words])
    stores = {name: None if args.noise else cells[0][name] for name in ("data", "youcook2")}
    noise, epochs = args.noise and list(map(str, args.noise)), list(map(str, args.epochs))
    grid = {"noise": noise, "videos": args.videos, "epochs": epochs}
    grid |= {"shift": list(map(str, args.shift))} if any(args.shift) else {}  # not of old studies
    given = vars(settings) | stores | grid
    with run.only_one(args.out) as lock:
        write_json(args.out, given, variants, command=command, cells=cells, runs=entries)
        print(f"{args.out}: {len(entries)} runs to compare, {len(chains)} chains", flush=True)
        failed = run.run(chains, args.out, args.jobs, lock, args.keep_epochs)
    from mcn_ext.study import report

    print(report.write(args.out))
    for message in failed:
        print(f"FAILED: {message}", file=sys.stderr)
    return int(bool(failed))
