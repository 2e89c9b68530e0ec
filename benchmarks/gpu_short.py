"""A short set for compute-sanitizer: few small calls of fastlstm on a GPU, forward and backward.

compute-sanitizer --tool memcheck python benchmarks/gpu_short.py

Results are compared with float64 on the CPU. It fails where a call goes torch's own way, since then
nothing of ours has been looked at.
"""

from __future__ import annotations

import sys
from typing import Any
from unittest.mock import patch

import torch
from cases import Case, Problem
from gpu_measure import TOLERANCE
from gpu_peers import PRECISIONS
from measure import check
from peers import fastlstm_module, torch_lstm

SHORT = [
    Case("short", 1, 1, 5, 7),
    Case("short", 5, 3, 5, 7),
    Case("short", 3, 2, 64, 128),
    Case("short", 3, 9, 8, 256),
    Case("short", 4, 17, 8, 33, num_layers=2, bidirectional=True),
    Case("short", 6, 4, 8, 40, shortest=2),
    Case("short", 3, 3, 8, 32, proj_size=12),
]


def refuse(*_: Any, **__: Any) -> Any:
    raise RuntimeError("fastlstm went torch's own way")


def main() -> int:
    device = sys.argv[1] if len(sys.argv) > 1 else "cuda"
    for case in SHORT:
        for precision in ("float32", "bfloat16"):
            dtype, _ = PRECISIONS[precision]
            rounded = Problem.random(case, "float32").map(
                lambda array, dtype=dtype: torch.from_numpy(array).to(dtype)
            )
            right = torch_lstm(rounded.map(torch.Tensor.double), training=True, threads=0)
            expected = right.results(right.call())
            if device == "cuda":
                expected = {name: torch.from_numpy(a).cuda() for name, a in expected.items()}
            problem = rounded.map(lambda tensor: tensor.to(device))
            with patch.object(torch.nn.LSTM, "forward", refuse):
                ours = fastlstm_module(problem, training=True, threads=0)
                errors = check(ours, expected, TOLERANCE[precision])
            print(f"{case.label} {precision}: {max(errors.values()):.0e}", flush=True)
    print("all right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
