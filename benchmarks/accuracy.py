"""Errors of the contrastive loss and its gradients against fp64, ours beside eager's.

    python benchmarks/accuracy.py              # seconds

y = x + noise / 2, or noise alone for a loss above 2 log N; the temperature is bisected in fp64
until the loss is the one wanted. The fp64 truth takes the same rounded inputs. Eager works in its
inputs' dtype: 16-bit rows, similarities and log_softmax. fp16 is under a loss scale of 2^15.
"""

import math

import torch
from common import DEVICE, describe, relative, save, show
from loss import MARGIN, eager

import mcn_ext
from mcn_ext import reference

# bf16 has 12 and 4 exactly, which would flatter it.
LOSSES, N, D = (11.7, 3.9, 2e-3, 1e-9), 256, 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pair(wanted, x, noise):
    """y (N, D) and the temperature at which the loss of x and y is ``wanted``."""
    independent = wanted > 2 * math.log(len(x))  # then colder is worse
    y, low, high = noise if independent else x + noise / 2, 1e-3, 1e2
    for _ in range(60):
        middle = math.sqrt(low * high)
        loss = reference.contrastive_loss(x, y, temperature=middle, margin=MARGIN)
        low, high = (middle, high) if (loss < wanted) != independent else (low, middle)
    return y, middle


def main():
    generator, table = torch.Generator().manual_seed(0), []
    x, noise = torch.randn(2, N, D, generator=generator, dtype=torch.float64).to(DEVICE)
    for wanted in LOSSES:
        y, temperature = pair(wanted, x, noise)
        for name, dtype in DTYPES.items():
            found = []
            for call, working in (
                (reference.contrastive_loss, torch.float64),
                (eager, dtype),
                (mcn_ext.contrastive_loss, dtype),
            ):
                rows = [r.to(dtype).to(working).requires_grad_() for r in (x, y)]
                loss = call(*rows, temperature=temperature, margin=MARGIN)
                scaled = loss * (2.0**15 if name == "fp16" else 1.0)
                found.append(([loss], torch.autograd.grad(scaled, rows)))
            row = {"loss": found[0][0][0].item(), "dtype": name}
            for i, what in enumerate(("loss", "gradients")):
                for whose, of in zip(("eager", "ours"), found[1:], strict=True):
                    row[f"{what}: {whose}"] = relative(of[i], found[0][i])
            table.append(row)
    show(f"Relative errors against fp64, N {N}, D {D}", table)
    save("accuracy", describe() | {"rows": table})


if __name__ == "__main__":
    main()
