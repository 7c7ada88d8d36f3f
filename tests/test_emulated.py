"""csrc/cuda.cu without a GPU: compiled by nvcc for its architectures, and run thread by thread.

Every test of the losses that a GPU would run runs here on the CUDA kernels, 16-bit rows included.
"""

import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mcn_ext import ops
from tests import test_distributed, test_loss, test_loss_kinds, test_loss_torch
from tests.conftest import torchrun
from tests.test_loss import check, contrastive, everything, mode, problem, way  # noqa: F401

ROOT = Path(__file__).parents[1]
NVCC = shutil.which("nvcc")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(NVCC is None, reason="no nvcc")]
# A load of 16 bytes from elsewhere ends the process, as it would end a GPU's context.
ALIGNED = ("-fsanitize=alignment", "-fno-sanitize-recover=alignment")
NOT_HERE = {  # threads of the CPU's kernels; the host's check of labels; minutes of emulation
    "test_kernels_do_not_depend_on_the_number_of_threads",
    "test_labels_outside_are_named_unless_invalid",
    "test_more_elements_than_32_bits_count",
}
for module in (test_loss, test_loss_kinds, test_loss_torch):
    for name, test in vars(module).items():
        if name.startswith("test_") and callable(test) and name not in NOT_HERE:
            if "device" in inspect.signature(test).parameters:
                globals()[name] = test


@pytest.fixture(autouse=True)
def small(request):
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if params.get("n", 0) > 500 or params.get("way") == "reference":
        pytest.skip("a minute each, thread by thread; or no kernel at all")


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_kernels_compile_without_spills(architecture, tmp_path):
    as_torch_does = "HALF_OPERATORS HALF_CONVERSIONS BFLOAT16_CONVERSIONS HALF2_OPERATORS".split()
    result = subprocess.run(
        [
            *f"{NVCC} -arch={architecture} -std=c++17 -O3 --expt-relaxed-constexpr".split(),
            *(f"-D__CUDA_NO_{name}__" for name in as_torch_does),
            *"-Xptxas -v -c".split(),
            ROOT / "csrc/cuda.cu",
            "-o",
            tmp_path / "cuda.o",
        ],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    assert len(spills) > 20 and set(spills) == {("0", "0")}, result.stderr


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The extension with the CUDA kernels, for a CPU."""
    folder = tmp_path_factory.mktemp("emulated")
    toolkit = Path(os.path.realpath(NVCC)).parents[1] / "include"
    if not (toolkit / "cuda_fp16.h").exists():  # nvcc is a wrapper
        text = subprocess.run(
            [NVCC, "--dryrun", "-c", ROOT / "csrc/cuda.cu"], capture_output=True, text=True
        ).stderr
        toolkit = Path(re.search(r"^#\$ _?TOP=(\S+)|^#\$ TOP=(\S+)", text, re.M)[1]) / "include"
    torch_root = Path(torch.__file__).parent
    flags = [
        *"-std=c++20 -O1 -fPIC -fno-math-errno -DMCN_EMULATE -DMCN_LIBRARY=mcn_emulated".split(),
        *ALIGNED,
        f"-I{torch_root}/include",
        f"-I{torch_root}/include/torch/csrc/api/include",
        f"-I{ROOT}/csrc",
    ]
    builds = [
        subprocess.Popen(
            ["g++", *flags, *extra, "-c", ROOT / "csrc" / source, "-o", folder / f"{source}.o"],
            stderr=subprocess.PIPE,
            text=True,
        )
        for source, extra in (
            ("loss.cpp", []),
            ("binding.cpp", []),
            ("cuda.cu", ["-include", ROOT / "tests/simt.h", f"-I{toolkit}", "-x", "c++"]),
        )
    ]
    for build in builds:
        errors = build.communicate()[1]
        assert build.returncode == 0, errors
    library = folder / "emulated.so"
    objects = folder.glob("*.o")
    libraries = f"-L{torch_root}/lib -lc10 -ltorch_cpu -o {library}".split()
    subprocess.run(["g++", "-shared", *ALIGNED, *objects, *libraries], check=True)
    return library


def emulate(library, patch):
    """From here on torch.ops.mcn is that extension."""
    torch.ops.load_library(str(library))
    for name in ("loss", "loss_backward"):
        torch.library.register_fake(f"mcn_emulated::{name}", getattr(ops, f"_fake_{name}"))
    patch.setattr(torch.ops, "mcn", torch.ops.mcn_emulated)
    patch.setattr(ops, "_multiplies_16_bits", lambda x: True)


@pytest.fixture(scope="module")
def device(library):
    with pytest.MonkeyPatch.context() as patch:
        emulate(library, patch)
        patch.setattr(test_loss, "REPEATS", 1)
        yield "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("n, d, tile", [(131, 24, 0), (70, 24, 33), (196, 23, 129)])
def test_blocks_and_tiles_of_every_kind(device, mode, monkeypatch, dtype, n, d, tile):  # noqa: F811
    """A block is 64 x 128, a run of 16 bytes 2 to 8 numbers: sizes cross and miss both, so that
    some blocks compare no keys, and some rows are read one number at a time."""
    monkeypatch.setattr(ops, "_tile", tile)
    rows, options = problem(n, d, device, dtype)
    check(contrastive(), rows[:2])
    check(everything(**options), rows)


def test_two_ranks_are_one_process(library, tmp_path):
    out = tmp_path / "found.pt"
    torchrun(2, __file__, library, out, cwd=ROOT)
    found = torch.load(out, weights_only=True)
    test_distributed.test_losses_and_gradients_are_those_of_one_process((2, found))


if __name__ == "__main__":  # a rank of the last test
    emulate(sys.argv[1], pytest.MonkeyPatch())
    test_distributed.main(Path(sys.argv[2]))
