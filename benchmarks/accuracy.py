"""Errors of the contrastive loss and its gradients against fp64, ours beside eager's.

    python benchmarks/accuracy.py              # seconds, on a CPU; on a GPU if there is one

y = x + noise / 2, or noise alone for a loss above 2 log N; the temperature is bisected in fp64
until the loss is the one wanted. The fp64 truth takes the same rounded inputs. Eager works in its
inputs' dtype: 16-bit rows, similarities and log_softmax.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from loss import DTYPES, MARGIN, ROOT, describe, eager, relative, take_gradients

import mcn_ext

# bf16 has 12 and 4 exactly, which would flatter it.
LOSSES = (11.7, 3.9, 2e-3, 1e-9)


def accuracy(device, n=256, d=64):
    """A dict for each loss and dtype: relative errors of the loss, and of the gradients together in
    Frobenius norm; printed as a Markdown table."""
    print(
        f"\nRelative errors against fp64, N {n}, D {d}; fp16 under a loss scale of 2^15\n\n"
        "| loss | inputs | loss: eager | ours | gradients: eager | ours |\n" + "|---" * 6 + "|"
    )
    generator, table = torch.Generator().manual_seed(0), []
    x, noise = torch.randn(2, n, d, generator=generator, dtype=torch.float64).to(device)
    for wanted in LOSSES:
        independent = wanted > 2 * math.log(n)  # then colder is worse
        y, low, high = noise if independent else x + noise / 2, 1e-3, 1e2
        for _ in range(60):
            t = math.sqrt(low * high)
            loss = mcn_ext.reference.contrastive_loss(x, y, temperature=t, margin=MARGIN)
            low, high = (t, high) if (loss < wanted) != independent else (low, t)
        for dtype, kind in DTYPES.items():
            rounded, found = [x.to(kind), y.to(kind)], []
            for call, working in (
                (mcn_ext.reference.contrastive_loss, torch.float64),
                (eager, kind),
                (mcn_ext.contrastive_loss, kind),
            ):
                inputs = [r.to(working, copy=True).requires_grad_() for r in rounded]
                loss = call(*inputs, temperature=t, margin=MARGIN)
                (loss * (2.0**15 if dtype == "fp16" else 1.0)).backward()
                found.append(([loss], take_gradients(inputs)))
            errors = [relative(f[i], found[0][i]) for i in (0, 1) for f in found[1:]]
            table.append(
                {
                    "loss": found[0][0][0].item(),
                    "temperature": t,
                    "dtype": dtype,
                    "eager, ours: loss, then gradients": errors,
                }
            )
            print(
                f"| {table[-1]['loss']:.2g} | {dtype} | "
                + " | ".join(f"{error:.1e}" for error in errors)
                + " |",
                flush=True,
            )
    return table


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--out", type=Path, help="default: benchmarks/results/accuracy-cpu.json or -gpu.json"
    )
    args = parser.parse_args()
    report = describe(args.device, "as stated")
    print(", ".join(f"{key} {value}" for key, value in report.items()))
    report["accuracy"] = accuracy(args.device)
    kind = "gpu" if args.device == "cuda" else "cpu"
    out = args.out or ROOT / f"benchmarks/results/accuracy-{kind}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
