"""Fixtures for all tests."""

from __future__ import annotations

import os

import fastlstm
import hypothesis
import numpy as np
import pytest
from fastlstm import _core

pytest.register_assert_rewrite("helpers_torch")  # its comparisons say what differs

# The same examples on every run: a red test stays red until it is mended.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(params=_core.supported_isas())
def isa(request):
    """Every instruction set this machine runs, one after the other."""
    before = _core.active_isa()
    _core.use_isa(request.param)
    yield request.param
    _core.use_isa(before)


def pytest_collection_modifyitems(items):
    """Leave out what an ISA has from avx512: float64, and float32 but on tiles."""

    def twice(item):
        params = item.callspec.params if hasattr(item, "callspec") else {}
        isa = params.get("isa")
        if isa == "avx512_bf16":
            return item.path.name != "test_half.py"
        return (isa, params.get("dtype")) == ("amx", np.float64)

    items[:] = [item for item in items if not twice(item)]


@pytest.fixture(params=[np.float32, np.float64], ids=["float32", "float64"])
def dtype(request):
    return request.param


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(autouse=True, scope="session")
def _inductor_cache(tmp_path_factory):
    """What torch.compile keeps on disk does not notice a change of our operators."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("inductor"))


@pytest.fixture(autouse=True)
def _restore_num_threads():
    yield
    fastlstm.set_num_threads(None)


@pytest.fixture
def torch():
    """For single tests that compare with torch in files that otherwise do without it."""
    return pytest.importorskip("torch", reason="compares with torch.nn.LSTM")
