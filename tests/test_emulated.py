"""csrc/cuda.cu without a GPU: compiled by nvcc for its architectures, and run thread by thread."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from mcn_ext import reference

ROOT = Path(__file__).parents[1]
NVCC = shutil.which("nvcc")
FEATURES = 24  # a run of 16 bytes in every dtype; 23 is none in any

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_kernels_compile_without_spills(architecture, tmp_path):
    """And print each kernel's registers: `pytest -s` shows the table."""
    result = subprocess.run(
        [NVCC, f"-arch={architecture}", "-std=c++17", "-O3", "--expt-relaxed-constexpr",
         *(f"-D__CUDA_NO_{name}__" for name in (  # as torch compiles extensions
             "HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS")),
         "-Xptxas", "-v", "-c", ROOT / "csrc/cuda.cu", "-o", tmp_path / "cuda.o"],
        capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = re.findall(r"Compiling entry function '(\S+)' for '(\w+)'.*?(\d+) bytes stack frame, "
                       r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
                       r"[^\n]*", result.stderr, re.S)
    names = subprocess.run(["c++filt", "-p"], input="\n".join(f[0] for f in found),
                           capture_output=True, text=True).stdout.split("\n")
    print(f"\n{architecture}: kernel, registers, stack bytes, spilled bytes")
    for name, (_, _, stack, stores, _, registers) in zip(names, found, strict=False):
        print(f"  {name.split('::')[-1]:60} {registers:>4} {stack:>5} {stores:>5}")
    assert len(found) > 20
    spilled = [f[0] for f in found if int(f[3]) or int(f[4])]
    assert not spilled, f"registers spill in {spilled}"


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """torch.ops.mcn_emulated: the extension with the CUDA kernels, run on the CPU."""
    folder = tmp_path_factory.mktemp("emulated")
    toolkit = Path(os.path.realpath(NVCC)).parents[1] / "include"
    if not (toolkit / "cuda_fp16.h").exists():  # nvcc is a wrapper
        text = subprocess.run([NVCC, "--dryrun", "-c", ROOT / "csrc/cuda.cu"], capture_output=True,
                              text=True).stderr
        toolkit = Path(re.search(r"^#\$ _?TOP=(\S+)|^#\$ TOP=(\S+)", text, re.M)[1]) / "include"
    torch_root = Path(torch.__file__).parent
    flags = ["-std=c++20", "-O1", "-fPIC", "-fno-math-errno", "-DMCN_EMULATE",
             "-DMCN_LIBRARY=mcn_emulated", f"-I{torch_root}/include",
             f"-I{torch_root}/include/torch/csrc/api/include", f"-I{ROOT}/csrc"]
    builds = [subprocess.Popen(["g++", *flags, *extra, "-c", ROOT / "csrc" / source, "-o",
                                folder / f"{source}.o"], stderr=subprocess.PIPE, text=True)
              for source, extra in (
                  ("loss.cpp", []), ("binding.cpp", []),
                  ("cuda.cu", ["-include", ROOT / "tests/simt.h", f"-I{toolkit}", "-x", "c++"]))]
    for build in builds:
        errors = build.communicate()[1]
        assert build.returncode == 0, errors
    library = folder / "emulated.so"
    subprocess.run(["g++", "-shared", *folder.glob("*.o"), f"-L{torch_root}/lib", "-lc10",
                    "-ltorch_cpu", "-o", library], check=True)
    torch.ops.load_library(str(library))
    return torch.ops.mcn_emulated


def problem(n, d, dtype, *, k=5, masks=False, seed=0):
    """Three modalities and their ids, masks, centroids and labels."""
    torch.manual_seed(seed)
    base = torch.randn(n, d, dtype=torch.float64)
    rows = [(base + torch.randn(n, d, dtype=torch.float64)).to(dtype) for _ in range(3)]
    valid = [torch.rand(n) > 0.3 for _ in range(3)] if masks else []
    if masks and n:
        for x, mask in zip(rows, valid, strict=True):
            x[~mask] = float("nan")
        rows[0][0], valid[0][0] = 0, True
    ids = [torch.randint(-n, n, (n,)) for _ in range(3)] if masks and n else []
    labels = torch.randint(0, k, (n,))
    return rows, ids, valid, torch.randn(k, d, dtype=torch.float64).to(dtype), labels


def run(operators, rows, ids, valid, centroids, labels, *, keep, tile, normalize=True,
        temperature=0.07):
    """Loss, gradient of each modality and of the temperature from the kernels."""
    dtype = torch.float64 if rows[0].dtype == torch.float64 else torch.float32
    arguments = (rows, [0, 1, 2, 0, 1, 2], ids, valid, [], centroids, labels, [0, 2],
                 torch.tensor(temperature, dtype=dtype), 0.001, normalize, 0.5, 0.7, [1, 1, 1],
                 True, keep, tile, [], 0, "")
    values, state, d_temperature, gradients = operators.loss(*arguments)
    if not keep:
        d_temperature, gradients = operators.loss_backward(torch.ones((), dtype=dtype), state,
                                                           *arguments)
    return [values[0], d_temperature, *gradients]


def expected(rows, ids, valid, centroids, labels, *, normalize=True, temperature=0.07,
             dtype=torch.float64):
    """The same from the reference, in float64 (or `dtype`, for what rounding costs)."""
    leaves = [x.to(dtype).requires_grad_() for x in rows]
    t = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
    names = ["a", "b", "c"]
    pairs = [("a", "b"), ("c", "a"), ("b", "c")]
    common = dict(temperature=t, margin=0.001, normalize=normalize)
    mask = dict(zip(names, valid, strict=False))
    x = dict(zip(names, leaves, strict=True))
    total = 0.0
    for i, (first, second) in enumerate(pairs):
        total = total + reference.contrastive_loss(
            x[first], x[second], ids=ids[i] if ids else None,
            valid=mask[first] & mask[second] if valid else None, **common) / 3
    for name in ("a", "c"):
        total = total + 0.5 * 0.7 / 2 * reference.cluster_loss(
            x[name], centroids.to(dtype), labels, valid=mask.get(name), **common)
    total.backward()
    return [total.detach(), t.grad, *(leaf.grad for leaf in leaves)]


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("n, tile, masks, d, dtype", [
    (70, 0, True, FEATURES, torch.bfloat16), (131, 0, True, FEATURES - 1, torch.float16),
    (131, 129, False, FEATURES, torch.float32), (33, 20, True, FEATURES - 1, torch.float64),
    (2, 0, False, 1, torch.float32), (1, 0, False, 3, torch.bfloat16),
    (0, 0, False, 3, torch.float32)])
def test_kernels_agree_with_the_reference(emulated, n, tile, masks, d, dtype, keep):
    """A block is 64 x 128: the sizes cross both, and tiles do not divide them."""
    given = problem(n, d, dtype, masks=masks)
    got = run(emulated, *given, keep=keep, tile=tile)
    # P and, when streaming, the result are rounded to 16 bits once each.
    tolerance = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 2**-9,
                 torch.bfloat16: 2**-6}[dtype]
    for value, want in zip(got, expected(*given), strict=True):
        size = want.abs().max() if want.numel() else 0
        assert torch.isfinite(value).all()
        torch.testing.assert_close(value.double(), want.double(), rtol=0,
                                   atol=float(tolerance * max(size, 1)))
