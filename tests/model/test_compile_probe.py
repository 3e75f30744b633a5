"""Whether torch.compile works here is found by a tiny compile: what a machine may lack is a line, not an end."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow
PROBE = "from nanochat_ray.model.compiling import why_not_compiled; print('why:', why_not_compiled('cpu'))"


@pytest.mark.parametrize("lacking", ["a cache folder", "Python.h"])
def test_a_tiny_compile_says_what_is_missing(lacking, tmp_path):
    (tmp_path / "file").touch()
    compiler = tmp_path / "g++"
    missing = "fatal error: Python.h: No such file or directory"
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exec g++ --version\necho "{missing}" >&2\nexit 1\n')
    compiler.chmod(0o755)
    there = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / ("file/cache" if lacking == "a cache folder" else "cache"))}
    env = os.environ | {"CXX": str(compiler)} | there
    done = subprocess.run([sys.executable, "-c", PROBE], env=env, capture_output=True, text=True, timeout=150)
    [why] = [line for line in done.stdout.splitlines() if line.startswith("why: ")]
    assert ("file" if lacking == "a cache folder" else lacking) in why
