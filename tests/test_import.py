"""Importing: no torch, the right ISA, and what `python -m fastlstm` reports."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import fastlstm
import pytest
from fastlstm import _core
from helpers import run_python, stdout_of

USE_EVERYTHING = """
import numpy as np, fastlstm
rnn = fastlstm.LSTM(3, 5, num_layers=2, bidirectional=True, rng=0)
y, state, tape = rnn.forward(np.ones((4, 2, 3), np.float32))
grads = rnn.backward(tape, y, state)
rnn.load_state_dict(rnn.state_dict())
assert y.shape == (4, 2, 10) and grads.x.shape == (4, 2, 3)
fastlstm.show_config()
"""

BLOCK_TORCH = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, NoTorch())
"""


def test_torch_is_not_imported():
    code = (
        "import sys, fastlstm\n"
        "assert not [m for m in sys.modules if m.split('.')[0] in ('torch', 'scipy', 'pandas')]\n"
        "import fastlstm.reference\n"
        "assert 'torch' not in sys.modules\n"
    )
    stdout_of(run_python(code))


@pytest.mark.parametrize(
    "block", [BLOCK_TORCH, "import sys; sys.modules['torch'] = None\n"], ids=["finder", "modules"]
)
def test_torch_is_not_needed(block):
    stdout_of(run_python(block + USE_EVERYTHING))


@pytest.mark.parametrize(
    "block", [BLOCK_TORCH, "import sys; sys.modules['torch'] = None\n"], ids=["finder", "modules"]
)
def test_the_torch_side_says_that_it_needs_torch(block):
    result = run_python(block + "import fastlstm.nn")
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode != 0
    assert last.startswith(("ImportError", "ModuleNotFoundError"))
    assert "torch" in last


def test_the_numpy_side_works_after_torch(torch):
    stdout_of(run_python("import torch\n" + USE_EVERYTHING, timeout=120))


TRAIN = """
import torch, fastlstm.nn
for make in fastlstm.nn.LSTM, fastlstm.nn.LSTMCell:
    y, _ = make(3, 5)(torch.ones(2, 3))
    y.sum().backward()
"""


def test_nothing_is_logged(torch):
    """Torch logs a warning where some of its functions are called."""
    result = run_python(TRAIN, timeout=120)
    assert (stdout_of(result), result.stderr) == ("", "")


def test_public_names():
    for name in (
        "LSTM",
        "lstm_forward",
        "lstm_backward",
        "set_num_threads",
        "get_num_threads",
        "show_config",
        "__version__",
    ):
        assert hasattr(fastlstm, name)
    assert set(fastlstm.__all__) <= set(dir(fastlstm))


def assert_is_a_report(text):
    """What a bug report needs."""
    assert fastlstm.__version__ in text
    for isa in _core.compiled_isas():
        assert isa in text
    for word in ("isa", "threads", "openmp", "compiler", "torch", "numpy", "python"):
        assert word in text.lower(), f"{word!r} is missing in\n{text}"


def test_show_config(capsys):
    assert fastlstm.show_config() is None
    assert_is_a_report(capsys.readouterr().out)


def test_python_m_fastlstm():
    result = subprocess.run(
        [sys.executable, "-m", "fastlstm"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "3"},
    )
    report = stdout_of(result)
    assert_is_a_report(report)
    assert re.search(r"^threads:\s+3\b", report, re.MULTILINE)


def test_version_is_that_of_the_distribution():
    from importlib.metadata import version

    assert fastlstm.__version__ == version("fastlstm")


@pytest.mark.parametrize("name", _core.supported_isas())
def test_environment_chooses_the_isa(name):
    code = "from fastlstm import _core; print(_core.active_isa())"
    assert stdout_of(run_python(code, FASTLSTM_ISA=name)) == name
    report = stdout_of(run_python("import fastlstm; fastlstm.show_config()", FASTLSTM_ISA=name))
    assert re.search(rf"^ISA:\s+{name}\b", report, re.MULTILINE)


def test_the_widest_isa_is_the_default():
    code = "from fastlstm import _core; print(_core.active_isa())"
    assert stdout_of(run_python(code, FASTLSTM_ISA="")) == _core.supported_isas()[-1]


@pytest.mark.skipif(sys.platform != "linux", reason="reads an ELF file")
def test_the_extension_is_not_linked_to_torch():
    """One build serves every torch version, and none."""
    if tool := shutil.which("readelf"):
        command = [tool, "--dynamic", "--wide", _core.__file__]
    elif tool := shutil.which("ldd"):
        command = [tool, _core.__file__]
    else:
        pytest.skip("neither readelf nor ldd is installed")
    libraries = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "libc.so" in libraries or "musl" in libraries  # the tool did read it
    for name in ("torch", "c10", "libpython"):
        assert name not in libraries


def test_python_stubs_are_installed():
    from importlib.resources import files

    assert files("fastlstm").joinpath("py.typed").is_file()
    assert files("fastlstm").joinpath("_core.pyi").is_file()
