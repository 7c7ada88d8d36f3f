"""Builds mcn_ext._C: C++ always, CUDA kernels when torch has CUDA and nvcc is there.

MCN_CUDA=0|1 forces CUDA off or on; TORCH_CUDA_ARCH_LIST, MAX_JOBS and DEBUG=1 are honoured.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup


def is_toolkit(folder: str | None) -> bool:
    """Whether nvcc and CUDA's headers (conda's lie in targets) are in a folder."""
    return bool(
        folder
        and shutil.which("nvcc", path=os.path.join(folder, "bin"))
        and any(
            any(Path(folder).glob(f"{include}/cuda_runtime_api.h"))
            for include in ("include", "targets/*/include")
        )
    )


def find_cuda_home() -> str | None:
    """CUDA_HOME if a toolkit is there, else the toolkit of the nvcc on the PATH.

    torch guesses the folder above nvcc's, which is wrong where that nvcc is a wrapper script.
    """
    given, nvcc = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"), shutil.which("nvcc")
    if is_toolkit(given) or nvcc is None:
        return given
    said = subprocess.run([nvcc, "--dryrun", "-c", "csrc/cuda.cu"], capture_output=True, text=True)
    top = re.search(r"^#\$ _?TOP=(\S+)", said.stderr, re.M)
    return os.path.realpath(top[1]) if top and is_toolkit(top[1]) else given


if home := find_cuda_home():  # before torch's import below, which reads it
    os.environ["CUDA_HOME"] = home
try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError:
    raise SystemExit(
        "mcn_ext is built against the torch you have: pip install torch==2.13.0 first, then "
        "pip install -e . --no-build-isolation"
    ) from None

if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 11):
    raise SystemExit(f"mcn_ext needs torch >= 2.11, found {torch.__version__}")

# Not torch.cuda.is_available(): login and build machines have nvcc and no GPU.
sources = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
kernels = sorted(str(path) for path in Path("csrc").glob("*.cu"))
possible = bool(torch.version.cuda and is_toolkit(CUDA_HOME))
wanted = os.environ.get("MCN_CUDA")
if torch.version.cuda is None:
    missing = f"torch {torch.__version__} is a build without CUDA; install one with it"
elif not possible:
    missing = (
        f"torch has CUDA {torch.version.cuda}, but there is no bin/nvcc or no "
        f"include/cuda_runtime_api.h under CUDA_HOME={CUDA_HOME}; install the CUDA toolkit, "
        "or set CUDA_HOME to where it is"
    )
if wanted == "1" and not possible:
    raise SystemExit(f"MCN_CUDA=1: {missing}")
if torch.version.cuda and not possible and wanted != "0":
    print(f"mcn_ext: building without CUDA kernels: {missing}", file=sys.stderr)
cuda = possible and wanted != "0"
os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")

level = ["-O0", "-g"] if os.environ.get("DEBUG") == "1" else ["-O3"]
# Comparisons may be evaluated for lanes that do not need them: else no loop with a mask vectorises.
host = level + ["-fno-math-errno", "-fno-trapping-math"]
if sys.platform == "linux":
    host.append("-fopenmp")  # to compile only: linked, it would bring a second pool of threads
extension = (CUDAExtension if cuda else CppExtension)(
    "mcn_ext._C",
    sources + (kernels if cuda else []),
    define_macros=[("MCN_WITH_CUDA", None)] if cuda else [],
    # No -std: torch 2.11 builds as C++17, 2.13 as C++20, and says so itself.
    extra_compile_args={"cxx": host, "nvcc": level} if cuda else host,
)
setup(
    ext_modules=[extension],
    cmdclass={"build_ext": BuildExtension.with_options(no_python_abi_suffix=True)},
)
