"""How threads share out work, in a program of their own: `tests/parallel.cpp`."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

COMPILER = os.environ.get("CXX", "g++")


@pytest.mark.parametrize("sanitizer", [None, "thread"])
def test_tasks_are_done_once_and_in_order(tmp_path, sanitizer):
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no compiler {COMPILER}")
    program = tmp_path / "parallel"
    command = [COMPILER, "-std=c++17", "-O1", "-pthread", "-Wall", "-Wextra", "-Werror"]
    if sanitizer:
        command.append(f"-fsanitize={sanitizer}")
    command += [str(Path(__file__).with_name("parallel.cpp")), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    if sanitizer and built.returncode:
        pytest.skip(f"{COMPILER} has no {sanitizer} sanitizer here")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("this kernel's addresses are not those that the sanitizer knows")
    assert done.returncode == 0, done.stdout + done.stderr
