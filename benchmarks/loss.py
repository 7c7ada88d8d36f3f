"""The contrastive loss against its alternatives: time and extra memory, side by side in one run.

    python benchmarks/loss.py                 # CPU fp32, 8 minutes on 2 idle cores; GPU bf16
    python benchmarks/loss.py --no-sweep      # the tables, without the figure over N
    python benchmarks/loss.py --rows quick    # a trial: seconds, tiny sizes, nothing is written
    python benchmarks/loss.py --draw benchmarks/results/loss-gpu.json --figure docs/loss-gpu.png

Each implementation normalises rows x, y (N, D), takes the softmax at temperature 0.05 in both
directions, with margin 0.001 where it has one, and must first agree with mcn_ext.reference. With
16-bit inputs eager runs under its inputs' type: 16-bit rows, similarities and log_softmax.

Time: median of the repeats, in each of which the implementations take turns; forward (gradients
wanted) and backward apart, waiting for the device after each. GPU, and --rows quick: in_a_row_ms is
forward and backward of calls that follow each other without waiting, as in training; host_ms the
part of it until the last call is launched; graph_ms the same as a CUDA graph, without the host.

siglip_kernel computes another loss (a sigmoid for each pair, not a softmax) beside siglip_eager.
Published for a GH200, B 65,536, bf16, pypi.org/project/siglip-kernel: 48.8 ms and 1.4 GB against
eager's 102.0 ms and 33 GB. It is measured where it is installed.

Memory: the peak above the inputs during forward and during backward; "extra" is the larger less the
gradients returned. CUDA: torch.cuda.max_memory_allocated. CPU (Linux): a process of its own calls
the loss at a tiny size (libraries, thread pools; torch.compile at full size, then malloc_trim),
notes VmRSS, writes 5 to /proc/self/clear_refs, which resets VmHWM, calls the loss, reads VmHWM.
Matrix libraries' own buffers count; malloc returns what is freed, so that live data are counted.
"""

import argparse
import ctypes
import gc
import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a checkout that was built in place, not installed

import torch  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import mcn_ext  # noqa: E402

TEMPERATURE, MARGIN, K = 0.05, 0.001, 256
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIGLIP = ("siglip_eager", "siglip_kernel")
GPU_ONLY = ("inf_cl", "cut_cross_entropy", *SIGLIP)
NO_MARGIN = ("open_clip", "inf_cl", "cut_cross_entropy")
SWEEP = ("eager", "compile", "ours", "ours_stream")
ALL = ("eager_published", "reference", *SWEEP, *NO_MARGIN)
# (N, D, mcn_loss of three modalities?, implementations, repeats)
ROWS = {
    "cpu": [
        (4096, 512, False, ALL, 5),
        (2048, 1024, False, ALL, 5),
        (4096, 6144, False, ("eager", "ours"), 3),
        (16384, 256, False, SWEEP, 3),
        (2048, 1024, True, ("reference", "eager", "ours", "ours_stream"), 5),
    ],
    "cuda": [
        (4096, 512, False, ALL, 20),
        (4096, 6144, False, ALL, 20),
        (65536, 1024, False, ("eager", "compile", "ours_stream", *NO_MARGIN), 3),
        (262144, 1024, False, ("ours_stream",), 2),
        (2048, 1024, True, ("reference", *SWEEP), 20),
        (65536, 768, False, ("ours_stream", *SIGLIP), 3),
    ],
    "quick": [
        (256, 64, False, tuple(name for name in ALL if name != "compile"), 3),
        (128, 64, True, ("eager", "ours", "ours_stream"), 3),
    ],
}
SWEEP_D, SWEEPS = 256, {"cpu": range(8, 15, 2), "cuda": range(10, 19, 2)}  # log2 N
# (device, dtype, N, D) -> ratios of time and extra memory of ours to those of another, or ms, MiB
HALF = [("in_a_row_ms", "eager", 0.5), ("in_a_row_ms", "open_clip", 0.5)]
TARGETS = {
    ("cpu", "fp32", 4096, 512): [("ms", "eager", 0.45), ("extra_mib", "eager", 0.3)],
    ("cpu", "fp32", 4096, 6144): [("ms", "eager", 0.97), ("extra_mib", "eager", 0.25)],
    ("cpu", "fp32", 2048, 1024): [("ms", "eager", 0.85)],
    ("cpu", "fp32", 2048, 1024, "terms"): [("ms", "eager", 0.8), ("extra_mib", "eager", 0.45)],
    ("cpu", "fp32", 16384, 256): [("ms", "eager", 0.4), ("extra_mib", None, 128)],
    ("cuda", "bf16", 4096, 512): [*HALF, ("in_a_row_ms", "compile", 0.9)],
    ("cuda", "bf16", 4096, 6144): [*HALF, ("in_a_row_ms", "compile", 1.0)],
    ("cuda", "bf16", 65536, 1024): [
        *HALF,
        ("in_a_row_ms", "compile", 1.3),
        ("extra_mib", None, 512),
    ],
    ("cuda", "bf16", 262144, 1024): [("in_a_row_ms", None, 1400)],
}


# ------------------------------------------------------------------------------ implementations
def symmetric(z):
    target = torch.arange(len(z), device=z.device)
    return F.nll_loss(F.log_softmax(z, 1), target) + F.nll_loss(F.log_softmax(z.t(), 1), target)


def eager(x, y, temperature=TEMPERATURE, margin=MARGIN, eye_device=None):
    s = F.normalize(x) @ F.normalize(y).t()
    eye = torch.eye(len(s), dtype=s.dtype, device=eye_device or s.device).to(s.device)
    return symmetric((s - margin * eye) / temperature)


def eager_terms(video, audio, text, centroids, labels):
    video, audio, text, mu = (F.normalize(rows) for rows in (video, audio, text, centroids))
    eye = MARGIN * torch.eye(len(video), dtype=video.dtype, device=video.device)
    own = MARGIN * F.one_hot(labels, len(mu)).to(mu.dtype)
    pairs = sum(
        symmetric((a @ b.t() - eye) / TEMPERATURE)
        for a, b in ((video, audio), (video, text), (audio, text))
    )
    clusters = sum(
        F.cross_entropy((rows @ mu.t() - own) / TEMPERATURE, labels)
        for rows in (video, audio, text)
    )
    return pairs / 3 + clusters / (3 * math.log(len(mu)))


def siglip(name, x, y):
    """The sigmoid loss of SigLIP, plain or by siglip-kernel; the temperature and bias are its."""
    x, y, bias = F.normalize(x), F.normalize(y), -10.0
    if name == "siglip_kernel":
        from siglip_kernel import fused_siglip_loss

        log_scale = torch.tensor(math.log(10.0), device=x.device)
        return fused_siglip_loss(x, y, log_scale, torch.tensor(bias, device=x.device))
    logits = 10 * x @ y.t() + bias
    signs = 2 * torch.eye(len(x), dtype=x.dtype, device=x.device) - 1
    return -F.logsigmoid(signs * logits).sum() / len(x)


def rival(name, x, y):
    if name in SIGLIP:
        return siglip(name, x, y)
    x, y, target = F.normalize(x), F.normalize(y), torch.arange(len(x), device=x.device)
    if name == "open_clip":  # its ClipLoss in one process, without the factor 1/2
        logits = x @ y.t() / TEMPERATURE
        return F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)
    sides = ((x / TEMPERATURE, y), (y / TEMPERATURE, x))
    if name == "inf_cl":  # cal_inf_loss in one process is this; it computes in fp32
        from inf_cl import cal_flash_loss

        width = math.gcd(x.shape[1], 256)
        return sum(cal_flash_loss(a, b, head_dim=width).mean() for a, b in sides)
    from cut_cross_entropy import linear_cross_entropy

    # filter_eps: by default small probabilities are left out of the gradient.
    return sum(linear_cross_entropy(a, b, target, filter_eps=None) for a, b in sides)


def fused(module, *inputs, margin=MARGIN, **budget):
    """mcn_ext's loss, or its reference's, for a pair or for three modalities."""
    settings = dict(temperature=TEMPERATURE, margin=margin, **budget)
    if len(inputs) == 2:
        return module.contrastive_loss(*inputs, **settings)
    rows = dict(zip(("video", "audio", "text"), inputs, strict=False))
    pairs = [("video", "audio"), ("video", "text"), ("audio", "text")]
    return module.mcn_loss(rows, pairs, *inputs[3:], **settings).total


def implementation(name, terms):
    plain = eager_terms if terms else eager
    if name == "compile":
        return torch.compile(plain, dynamic=False)
    return {
        "eager_published": lambda x, y: eager(x, y, eye_device="cpu"),
        "eager": plain,
        "reference": lambda *inputs: fused(mcn_ext.reference, *inputs),
        "ours": lambda *inputs: fused(mcn_ext, *inputs),
        "ours_stream": lambda *inputs: fused(mcn_ext, *inputs, budget=0),
    }.get(name) or (lambda x, y: rival(name, x, y))


# ------------------------------------------------------------------------------ measuring
def make(n, d, terms, dtype, device):
    """Inputs, the embeddings first; rows of a pair are similar."""
    options = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    first = torch.randn(n, d, **options)
    rows = [first] + [first + 2 * torch.randn(n, d, **options) for _ in range(2 if terms else 1)]
    rows = [x.to(DTYPES[dtype]).requires_grad_() for x in rows]
    return (
        rows + [torch.randn(K, d, **options).to(DTYPES[dtype]), torch.randint(K, (n,), **options)]
        if terms
        else rows
    )


def take_gradients(inputs):
    out = [x.grad for x in inputs if x.requires_grad]
    for x in inputs:
        x.grad = None
    return out


def ready(name, n, d, terms, dtype, device):
    """The implementation, called once: at a tiny size, or compiled for this one."""
    call = implementation(name, terms)
    call(*make(n if name == "compile" else min(n, 64), d, terms, dtype, device)).backward()
    return call


def peaks(call, inputs, reset, peak, base):
    reset()
    loss = call(*inputs)
    forward = peak() - base
    reset()
    loss.backward()
    backward = peak() - base
    returned = sum(g.nbytes for g in take_gradients(inputs))
    return {
        "forward_mib": forward / 2**20,
        "backward_mib": backward / 2**20,
        "extra_mib": max(forward - returned, backward - returned, 0) / 2**20,
    }


def proc(file, field):
    """A size in bytes that Linux reports."""
    lines = Path("/proc", file).read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def cpu_peaks(threads, name, *size):
    """In a process of its own: peaks of the resident set in one call."""
    torch.set_num_threads(threads)
    call, inputs = ready(name, *size), make(*size)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return peaks(
        call,
        inputs,
        lambda: Path("/proc/self/clear_refs").write_text("5"),
        lambda: proc("self/status", "VmHWM"),
        proc("self/status", "VmRSS"),
    )


def memory(call, inputs, name, *size):
    if inputs[0].is_cuda:
        return peaks(
            call,
            inputs,
            torch.cuda.reset_peak_memory_stats,
            torch.cuda.max_memory_allocated,
            torch.cuda.memory_allocated(),
        )
    context = multiprocessing.get_context("forkserver")
    # Imported once, not yet used: the children are fresh.
    context.set_forkserver_preload(["torch", "torch._inductor.compile_fx"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(cpu_peaks, torch.get_num_threads(), name, *size).result()


def clock(device):
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * time.perf_counter()


def in_a_row(call, inputs, device, n):
    """Milliseconds a call, forward and backward, among ``n`` that do not wait; the host's part."""
    leaves, begin = [x for x in inputs if x.requires_grad], clock(device)
    for _ in range(n):
        torch.autograd.grad(call(*inputs), leaves)
    launched = 1e3 * time.perf_counter()
    return (clock(device) - begin) / n, (launched - begin) / n


def graph_ms(call, inputs, n):
    """The same, replayed from a CUDA graph; or why it has none."""
    leaves = [x for x in inputs if x.requires_grad]
    try:
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # a capture wants a warm-up on a stream of its own
            for _ in range(3):
                torch.autograd.grad(call(*inputs), leaves)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            kept = torch.autograd.grad(call(*inputs), leaves)
        graph.replay()
        begin = clock("cuda")
        for _ in range(n):
            graph.replay()
        del kept
        return (clock("cuda") - begin) / n
    except RuntimeError as error:  # not all that is compared can be captured
        torch.cuda.synchronize()
        return f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"


def too_large(name, n, dtype, device):
    """Whether an N x N matrix is sure not to fit: Linux promises memory that it lacks, and kills;
    a compiler works for 10 s before it finds out."""
    if name.startswith(("ours", "inf_cl", "cut_cross_entropy", "siglip_kernel")):
        return False
    if device == "cuda":
        return (12 if dtype != "fp32" else 24) * n * n > torch.cuda.mem_get_info()[0]
    return 24 * n * n > proc("meminfo", "MemAvailable")


def measure(names, repeats, *size, row=0):
    """One row of the table: name -> milliseconds and MiB, or {"error": "out of memory"}; ``row``:
    how many calls follow each other without waiting."""
    n, d, terms, dtype, device = size
    torch._dynamo.reset()  # sizes compile anew, and past 8 of one function torch would give up
    inputs, calls, results = make(*size), {}, {name: {} for name in names}
    times, rows = {name: [] for name in names}, {name: [] for name in names}
    for step in range(-1, repeats + 1):
        for name in [name for name in names if "error" not in results[name]]:
            try:
                if step < 0:
                    if too_large(name, n, dtype, device):
                        raise torch.OutOfMemoryError
                    calls[name] = ready(name, *size)
                elif step < repeats:
                    begin = clock(device)
                    loss = calls[name](*inputs)
                    middle = clock(device)
                    loss.backward()
                    times[name].append((middle - begin, clock(device) - middle))
                    take_gradients(inputs)
                    loss = None
                    if row:
                        rows[name].append(in_a_row(calls[name], inputs, device, row))
                else:
                    results[name] = memory(calls[name], inputs, name, *size)
            except (torch.OutOfMemoryError, BrokenProcessPool):
                results[name] = {"error": "out of memory"}
                take_gradients(inputs)
            loss = None  # a graph would hold its memory
    for name in [name for name in names if "error" not in results[name]]:
        forward, backward = zip(*times[name], strict=True)
        results[name].update(
            forward_ms=median(forward),
            backward_ms=median(backward),
            ms=median(map(sum, times[name])),
        )
        if row:
            whole, host = zip(*rows[name], strict=True)
            results[name].update(in_a_row_ms=median(whole), host_ms=median(host))
        if device == "cuda" and n <= 16384:
            results[name]["graph_ms"] = graph_ms(calls[name], inputs, row)
    return {"n": n, "d": d, "terms": terms, "dtype": dtype, "repeats": repeats, "results": results}


# ------------------------------------------------------------------------------ checking
def relative(found, true):
    """Frobenius norm of the error over that of the truth, over all tensors."""
    found, true = (torch.cat([t.detach().double().flatten() for t in ts]) for ts in (found, true))
    return float((found - true).norm() / true.norm())


def check(names, *size):
    """Those that agree with the reference. The rest are not installed, or fail, and it is said."""
    limits, agreed = (1e-5, 1e-4) if "fp32" in size else (5e-2, 1e-1), []
    for name in dict.fromkeys(names):
        inputs = make(*size)
        true = (
            siglip("siglip_eager", *(x.float() for x in inputs))
            if name in SIGLIP
            else fused(mcn_ext.reference, *inputs, margin=0 if name in NO_MARGIN else MARGIN)
        )
        true.backward()
        true_gradients = take_gradients(inputs)
        try:
            loss = implementation(name, len(inputs) > 2)(*inputs)
            loss.backward()
        except Exception as error:  # a compiler or a rival's kernel that fails is a result
            if name != "compile" and name not in (*NO_MARGIN, *SIGLIP):
                raise
            print(f"- {name} left out: {f'{type(error).__name__}: {error}'.splitlines()[0][:150]}")
            continue
        errors = relative([loss], [true]), relative(take_gradients(inputs), true_gradients)
        met = errors[0] <= limits[0] and errors[1] <= limits[1]
        print(
            f"- {name}: loss {errors[0]:.1e}, gradients {errors[1]:.1e}"
            + ("" if met else " LEFT OUT, above {}, {}".format(*limits)),
            flush=True,
        )
        if not met and name.startswith("ours"):
            sys.exit(f"{name} disagrees with mcn_ext.reference: there is nothing to time")
        agreed += [name] if met else []
    return agreed


# ------------------------------------------------------------------------------ reporting
def show(row, device):
    """A row as a Markdown table, with what is asked of it, met or missed; the row."""
    n, d, terms, dtype, results = (row[key] for key in ("n", "d", "terms", "dtype", "results"))
    wanted = list(TARGETS.get((device, dtype, n, d, *(["terms"] if terms else [])), []))
    if device == "cuda":  # the others take at least 1.5 times as long
        wanted += [("in_a_row_ms", name, 1 / 1.5) for name in NO_MARGIN[1:] if name in results]
    ours, row["targets"] = "ours" if n < 16384 else "ours_stream", []
    for what, other, limit in wanted:
        value, base = results.get(ours, {}).get(what), results.get(other, {}).get(what, not other)
        verdict = (
            "not measured"
            if not value or not base
            else (f"{value / base:.3g}, {'met' if value <= limit * base else 'missed'}")
        )
        whose = f" of {other}" if other else ""
        row["targets"].append(f"{what} <= {limit:.3g}{whose}: {verdict}")
    keys = [
        key
        for key in (
            "forward_ms",
            "backward_ms",
            "ms",
            "in_a_row_ms",
            "host_ms",
            "graph_ms",
            "forward_mib",
            "backward_mib",
            "extra_mib",
        )
        if any(key in result for result in results.values())
    ]
    print(
        f"\n{f'mcn_loss, 3 modalities, K {K}' if terms else 'contrastive_loss'}, N {n}, D {d}, "
        f"{dtype}, median of {row['repeats']}\n\n| loss | {' | '.join(keys)} | ms / eager "
        "| extra / eager | target |\n|---|" + "---:|" * (len(keys) + 2) + "---|"
    )
    for name, result in results.items():
        base = results.get("eager", {})
        cells = [
            result[key]
            if isinstance(result.get(key), str)
            else f"{result[key]:.4g}"
            if key in result
            else ""
            for key in keys
        ] + [
            f"{result[key] / base[key]:.2f}" if result.get(key) and base.get(key) else ""
            for key in ("ms", "extra_mib")
        ]
        note = result.get("error") or ("; ".join(row["targets"]) if name == ours else "")
        print(f"| {name} | {' | '.join(cells)} | {note} |", flush=True)
    return row


def draw(report, path):
    """Time and extra memory over N."""
    from mcn_ext.train.curves import _pyplot, _save

    plt, sweep = _pyplot(), report["sweep"]
    if plt is None:
        return
    plt.rcParams["font.size"] = 10
    styles = {
        "eager": ("eager", "dimgray"),
        "compile": ("torch.compile", "tab:orange"),
        "ours": ("ours, keeping P", "tab:blue"),
        "ours_stream": ("ours, streaming", "tab:green"),
    }
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    titles = ("time, ms", "memory beyond inputs and gradients, MiB")
    for axis, key, title in zip(axes, ("ms", "extra_mib"), titles, strict=True):
        ends = []
        for name, (label, color) in styles.items():
            line = [
                (row["n"], row["results"].get(name, {}).get(key, 0))
                for row in sweep
                if name != "ours" or row["n"] ** 2 * 4 <= 2**31
            ]  # above, S exceeds the budget
            line = [(n, value) for n, value in line if value > (1 if key == "extra_mib" else 0)]
            if len(line) < 2:
                continue
            axis.plot(*zip(*line, strict=True), "o-", markersize=3, color=color)
            n1, m1 = line[-1]
            ends.append((m1, n1, label, color))
        low, high = axis.dataLim.intervaly
        floor = 0.0
        for value, n, label, color in sorted(ends):  # labels of lines that meet are moved apart
            floor = max(value, (high / low) ** 0.06 * floor)
            axis.annotate(
                label, (n, floor), (6, 0), textcoords="offset points", color=color, va="center"
            )
        axis.set(xscale="log", yscale="log", xlabel="N")
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xticks([row["n"] for row in sweep], [str(row["n"]) for row in sweep], minor=False)
        axis.minorticks_off()
        axis.yaxis.set_major_formatter("{x:,.0f}")
    figure.suptitle(
        f"contrastive loss, forward and backward, D {sweep[0]['d']}, "
        f"{report['dtype']}, {report['machine']}"
    )
    print(f"figure: {_save(figure, Path(path))}")


def describe(device, dtype):
    """The machine and the versions that the numbers belong to."""
    if device == "cuda":
        name, size = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    else:
        names = [
            line.split(": ")[1]
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        name, size = (names or ["CPU"])[0], proc("meminfo", "MemTotal")
    try:
        commit = subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip()
    except FileNotFoundError:  # no git: a copy of the tree
        commit = ""
    return {
        "machine": name,
        "memory_mib": size // 2**20,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "dtype": dtype,
        "commit": commit or "unknown",
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    switch, cuda = argparse.BooleanOptionalAction, torch.cuda.is_available()
    parser.add_argument("--rows", choices=("all", "quick"), default="all")
    parser.add_argument("--repeats", type=int, help="of every row; default: 1 to 20, by its size")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--sweep", action=switch, help="over N, for the figure; default: not quick")
    parser.add_argument(
        "--out",
        type=Path,
        help="default: benchmarks/results/loss-cpu.json or -gpu.json; quick: none",
    )
    parser.add_argument("--figure", type=Path, help="default: docs/loss.png or docs/loss-gpu.png")
    parser.add_argument("--draw", type=Path, metavar="JSON", help="only draw this run's figure")
    args = parser.parse_args()
    quick, device = args.rows == "quick", args.device
    figure = args.figure or ROOT / f"docs/loss{'-gpu' if device == 'cuda' else ''}.png"
    if args.draw:
        return draw(json.loads(args.draw.read_text()), figure)
    dtype = args.dtype or ("bf16" if device == "cuda" else "fp32")
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "131072"  # measuring processes return what they free
    report = describe(device, dtype)
    print(
        ", ".join(f"{key} {value}" for key, value in report.items())
        + "\n\nAgreement with mcn_ext.reference, relative, N 320, D 256\n"
    )
    rows = ROWS["quick" if quick else device]
    names = {
        terms: [
            name
            for row in rows
            if row[2] == terms
            for name in row[3]
            if device == "cuda" or name not in GPU_ONLY
        ]
        for terms in (False, True)
    }
    known = {terms: check(names[terms], 320, 256, terms, dtype, device) for terms in names}

    out = args.out or ROOT / f"benchmarks/results/loss-{'gpu' if device == 'cuda' else 'cpu'}.json"

    def run(n, d, terms, names, repeats, kind="rows"):
        names = [name for name in names if name in known[terms]]
        calls = 2 if quick or n > 8192 else 10
        result = measure(
            names,
            args.repeats or repeats,
            n,
            d,
            terms,
            dtype,
            device,
            row=calls if quick or device == "cuda" else 0,
        )
        report.setdefault(kind, []).append(show(result, device))
        if args.out or not quick:  # after each row: the next may be stopped
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(report, indent=1) + "\n")

    for row in rows:
        run(*row)
    if args.sweep or (args.sweep is None and not quick):
        for i in SWEEPS[device][: 2 if quick else None]:
            known_row = [row for row in report["rows"] if (row["n"], row["d"]) == (2**i, SWEEP_D)]
            if known_row:
                report.setdefault("sweep", []).extend(known_row)
            else:
                run(2**i, SWEEP_D, False, SWEEP, 5, "sweep")
        draw(report, figure)


if __name__ == "__main__":
    main()
