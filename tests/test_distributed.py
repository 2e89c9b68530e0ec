"""Training on two processes equals training on one with the whole batch.

The processes run on this machine and meet through a file (gloo, loopback). They start once and run
every case, since starting takes longer than all the cases.
"""

from __future__ import annotations

import datetime
import os
import pathlib
import subprocess
import sys
import time

import pytest
from helpers import stdout_of

torch = pytest.importorskip("torch", reason="tests of the torch side")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

import fastlstm.nn  # noqa: E402 - needs torch
from fastlstm import _steps  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.utils import rnn  # noqa: E402

RANKS, STEPS, N, T, D, H = 2, 5, 6, 7, 4, 5
SECONDS = 300  # no test waits longer for its processes
LENGTHS = [T, 4, 2, T, 6, 1]


class Model(nn.Module):
    """Padded, projected, packed and stepwise: every way the kernels are called."""

    def __init__(self, lstm, cell):
        super().__init__()
        self.embed = nn.Linear(D, D)
        self.padded = lstm(D, H, num_layers=2, bidirectional=True, batch_first=True)
        self.packed = lstm(2 * H, H, proj_size=3, batch_first=True)
        self.stack = nn.ModuleList([cell(3, H), cell(H, H, bias=False)])
        self.head = nn.Linear(H, 1)

    def forward(self, x, lengths):
        x, _ = self.padded(self.embed(x))
        packed = rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        x, _ = rnn.pad_packed_sequence(self.packed(packed)[0], batch_first=True, total_length=T)
        for cell in self.stack:
            state, outputs = None, []
            for step in x.unbind(1):
                state = cell(step, state)
                outputs.append(state[0])
            x = torch.stack(outputs, 1)
        return self.head(x[:, -1])


def build(source, dtype):
    """With weights large enough for gradients to reach the first layer."""
    torch.manual_seed(0)
    model = Model(source.LSTM, source.LSTMCell).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    return model


def batches(dtype):
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(N, T, D, dtype=dtype, generator=generator)
        yield x, torch.randn(N, 1, dtype=dtype, generator=generator)


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.5, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 0.01),
}


def train(model, optimizer, dtype, rank=0, ranks=1):
    """The loss of each step, on the part of each batch that is this rank's."""
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    losses = []
    for x, y in batches(dtype):
        mine = slice(rank, None, ranks)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x[mine], LENGTHS[mine]), y[mine])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def data_parallel(model, **options):
    return nn.parallel.DistributedDataParallel(model, **options)


def fully_sharded(model, **options):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))
    # The layers each on their own, as large models are, and the rest together.
    for module in (model.padded, model.packed, *model.stack, model):
        fully_shard(module, mesh=mesh, **options)
    return model


# Case: how the model is shared, what it is made of, when it is converted, optimizer, dtype, and
# options of the sharing.
F32, F64 = torch.float32, torch.float64
CASES = {
    "ddp": (data_parallel, fastlstm.nn, None, "adamw", F64, {}),
    "ddp, converted": (data_parallel, nn, "before", "sgd", F64, {}),
    "ddp, converted after": (data_parallel, nn, "after", "adamw", F64, {}),
    "ddp, float32": (data_parallel, fastlstm.nn, None, "sgd", F32, {}),
    "ddp, static graph": (data_parallel, fastlstm.nn, None, "sgd", F64, {"static_graph": True}),
    "ddp, unused": (data_parallel, fastlstm.nn, None, "sgd", F64, {"find_unused_parameters": True}),
    "fsdp": (fully_sharded, fastlstm.nn, None, "adamw", F64, {}),
    "fsdp, converted": (fully_sharded, nn, "before", "sgd", F64, {}),
    "fsdp, converted after": (fully_sharded, nn, "after", "adamw", F64, {}),
    "fsdp, float32": (fully_sharded, fastlstm.nn, None, "sgd", F32, {}),
    "fsdp, whole": (fully_sharded, fastlstm.nn, None, "sgd", F64, {"reshard_after_forward": False}),
}
if torch.__version__ < "2.6":  # fully_shard is not there yet
    CASES = {name: case for name, case in CASES.items() if case[0] is not fully_sharded}
WITH_DTENSOR = torch.__version__ >= "2.6"
CLIP = 1.0  # cuts gradients, whose norm is over all ranks


def train_together(rank):
    """What each case gives on all ranks: losses, whole parameters, and how many modules are ours.

    The last before and after `revert`.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    _steps._LEAST, _steps._WORTH = 0, 1  # steps of cells share a node
    results = {}
    for name, (share, source, converted, optimizer, dtype, options) in CASES.items():
        model = build(source, dtype)
        if converted == "before":
            fastlstm.nn.convert(model)
        shared = share(model, **options)
        if converted == "after":
            fastlstm.nn.convert(shared)
        losses = train(shared, optimizer, dtype, rank, RANKS)
        torch.distributed.all_reduce(losses)
        # By the names that the model alone has, whatever is around it.
        state = get_model_state_dict(shared, options=whole)
        ours = count_ours(shared), count_ours(fastlstm.nn.revert(shared))
        results[name] = losses / RANKS, state, ours
    if WITH_DTENSOR:
        from torch.distributed.tensor.experimental import implicit_replication

        found = {"parts": results_and_gradients(fastlstm.nn, divided)}
        with implicit_replication():
            found["whole"] = results_and_gradients(
                fastlstm.nn, lambda: (undivided()[0], divided()[1])
            )
        results["dtensor"] = {k: [t.full_tensor() for t in part] for k, part in found.items()}
    return results


def divided():
    """Return how to give each rank its part of a tensor along a dimension, and a module."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

    mesh = init_device_mesh("cpu", (RANKS,))
    return (
        lambda tensor, dim: distribute_tensor(tensor, mesh, [Shard(dim)]),
        lambda module: distribute_module(module, mesh),
    )


def undivided():
    return (lambda tensor, dim: tensor), (lambda module: module)


def results_and_gradients(source, places=undivided):
    """What a layer and a cell return, and the gradients of their parameters."""
    tensor, module = places()
    torch.manual_seed(2)
    layer = module(source.LSTM(D, H, bidirectional=True, dtype=F64))
    cell = module(source.LSTMCell(D, H, dtype=F64))
    x = torch.randn(T, N, D, dtype=F64)
    state = torch.randn(2, 2, N, H, dtype=F64)
    y, _ = layer(tensor(x, 1), tuple(tensor(s, 1) for s in state))
    h, c = cell(tensor(x[0], 0), tuple(tensor(s, 0) for s in state[0]))
    (y.square().sum() + h.square().sum() + c.square().sum()).backward()
    return [y, h, c, *(p.grad for p in (*layer.parameters(), *cell.parameters()))]


def count_ours(model):
    return sum(isinstance(m, fastlstm.nn.LSTM | fastlstm.nn.LSTMCell) for m in model.modules())


def run(rank, folder, job, *args):
    """A process: join the others, do the job, leave the result of rank 0 in the folder."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=SECONDS),
    )
    nn.LSTM.forward = nn.LSTMCell.forward = None  # no way back to torch's own path
    result = job(rank, *args)
    if rank == 0:
        torch.save(result, f"{folder}/result")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # threads of gloo that are still there may abort the interpreter's own end


def on_all_ranks(folder, job, *args):
    """The result of rank 0. An error on any rank is raised here; none outlives the test."""
    with pytest.MonkeyPatch.context() as patch:
        if sys.platform == "linux":
            patch.setenv("GLOO_SOCKET_IFNAME", "lo")  # this machine's name may lead nowhere
        processes = torch.multiprocessing.spawn(run, (folder, job, *args), nprocs=RANKS, join=False)
    deadline = time.monotonic() + SECONDS
    try:
        while not processes.join(timeout=1):
            assert time.monotonic() < deadline, f"not done after {SECONDS} s"
    finally:
        for process in processes.processes:
            process.kill()
    return torch.load(f"{folder}/result", weights_only=True)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    return on_all_ranks(str(tmp_path_factory.mktemp("ranks")), train_together)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(together, case):
    """Losses and parameters after several steps, beside torch's classes and the whole batch."""
    losses, state, ours = together[case]
    assert ours == (4, 0)
    *_, optimizer, dtype, _ = CASES[case]
    theirs = build(nn, dtype)
    before = {name: value.clone() for name, value in theirs.state_dict().items()}
    expected = train(theirs, optimizer, dtype)
    tolerance = {F64: 1e-12, F32: 1e-5}[dtype]
    torch.testing.assert_close(losses, expected, rtol=tolerance, atol=tolerance)
    assert list(state) == list(before)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=tolerance, atol=tolerance)
        assert (value - before[name]).abs().max() > 100 * tolerance  # something was learnt


@pytest.mark.skipif(not WITH_DTENSOR, reason="older torch")
@pytest.mark.parametrize("batch", ["parts", "whole"])
def test_distributed_tensors(together, batch):
    """Parameters on every rank; the batch in parts, or as a plain tensor."""
    found = together["dtensor"][batch]
    for actual, expected in zip(found, results_and_gradients(nn), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [0, 2], ids=["python", "torchrun"])
def test_example(ranks):
    """examples/train_ddp.py on a small model; it exits with an error where the results differ."""
    for module in ("tsdata", "pandas", "matplotlib", "rich", "tqdm"):
        pytest.importorskip(module, reason="the example needs the extra [examples]")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    script = pathlib.Path(__file__).parents[1] / "examples" / "train_ddp.py"
    options = "--epochs 1 --hidden 4 --look-back 8 --batch-size 512".split()
    result = subprocess.run(
        [sys.executable, *(launcher if ranks else []), str(script), *options],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert "equals training on one" in stdout_of(result)
