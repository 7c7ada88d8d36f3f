"""setup.py finds the CUDA toolkit, or says what is missing. Nothing is compiled."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

# setup.py under a torch with CUDA, up to what it would build.
SETUP = """
import os, runpy, setuptools, torch
torch.version.cuda, torch.cuda._is_compiled = "13.0", lambda: True
torch.cuda.is_available = lambda: False
setuptools.setup = lambda ext_modules, **_: print(
    os.environ.get("CUDA_HOME"), any(s.endswith(".cu") for s in ext_modules[0].sources))
runpy.run_path("setup.py")
"""


def write_nvcc(path, text="#!/bin/sh\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def toolkit(tmp_path):
    folder = tmp_path / "toolkit"
    write_nvcc(folder / "bin/nvcc", f"#!/bin/sh\necho '#$ TOP={folder}/bin/..' >&2\n")
    (folder / "include").mkdir()
    (folder / "include/cuda_runtime_api.h").touch()
    return folder


def setup(path, **env):
    env = {
        k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH", "MCN_CUDA")
    } | env
    return subprocess.run(
        [sys.executable, "-c", SETUP],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=env | {"PATH": f"{path}:/usr/bin:/bin"},
    )


@pytest.mark.parametrize("given", [None, "nothing"])
def test_the_toolkit_behind_a_wrapper_is_found(tmp_path, toolkit, given):
    wrapper = tmp_path / "local/bin/nvcc"
    write_nvcc(wrapper, f'#!/bin/sh\nexec {toolkit}/bin/nvcc "$@"\n')
    env = {} if given is None else {"CUDA_HOME": str(tmp_path / given)}
    done = setup(wrapper.parent, MCN_CUDA="1", **env)
    assert done.stdout.split() == [str(toolkit.resolve()), "True"], done.stderr


def test_a_toolkit_that_is_given_is_kept(tmp_path, toolkit):
    write_nvcc(tmp_path / "local/bin/nvcc")
    done = setup(tmp_path / "local/bin", CUDA_HOME=str(toolkit))
    assert done.stdout.split() == [str(toolkit), "True"], done.stderr


def test_what_is_missing_is_said(tmp_path):
    """An nvcc that does not say where its toolkit is, and one whose toolkit has no headers."""
    write_nvcc(tmp_path / "a/bin/nvcc")
    write_nvcc(tmp_path / "b/bin/nvcc", f"#!/bin/sh\necho '#$ TOP={tmp_path}/b/bin/..' >&2\n")
    for name in "ab":
        done = setup(tmp_path / name / "bin", MCN_CUDA="1")
        assert done.returncode == 1 and not done.stdout
        assert done.stderr.splitlines()[-1] == (
            "MCN_CUDA=1: torch has CUDA 13.0, but there is no bin/nvcc or no "
            f"include/cuda_runtime_api.h under CUDA_HOME={tmp_path / name}; install the CUDA "
            "toolkit, or set CUDA_HOME to where it is"
        )
    done = setup(tmp_path / "a/bin")
    assert done.stdout.split()[-1] == "False" and "without CUDA kernels" in done.stderr
