"""Train the electricity-demand forecaster on several processes, then on one: the results are equal.

    torchrun --nproc-per-node 2 examples/train_ddp.py

The model is that of forecast.py, made of torch.nn, converted, and wrapped in
DistributedDataParallel with gloo. Each process takes its share of every batch. Then one process
trains a second model on the whole batches, in the same order, and prints by how much the two
differ. Without torchrun (`python examples/train_ddp.py`) one process does both.
"""

from __future__ import annotations

import argparse
import os

import fastlstm.nn
import torch
import torch.distributed as dist
from forecast import CLIP_NORM, LEARNING_RATE, Data, Forecaster, load, positive, rmse
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from tqdm import tqdm

# A larger difference, as a share of the largest weight of the same parameter, is not rounding: the
# sums over two halves of a batch round in another way than the sum over all of it, at every step.
ROUNDING = 1e-4


def train(
    model: nn.Module, data: Data, args: argparse.Namespace, rank: int = 0, ranks: int = 1
) -> None:
    """Train on this rank's share of each batch: all of it where there is one rank."""
    rows = data.rows(data.train, args.look_back)
    sampler = DistributedSampler(rows, ranks, rank, seed=args.seed, drop_last=True)
    loader = DataLoader(rows, args.batch_size // ranks, sampler=sampler, drop_last=True)
    lags = torch.arange(1 - args.look_back, 1)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    with tqdm(
        total=args.epochs * len(loader),
        desc=f"{ranks} process{'es' if ranks > 1 else ''}",
        unit="batch",
        mininterval=0.5,
        disable=rank > 0,
    ) as progress:
        for epoch in range(args.epochs):
            sampler.set_epoch(epoch)
            for share in loader:
                loss = nn.functional.mse_loss(
                    model(data.features[share[:, None] + lags]), data.targets[share]
                )
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
                optimizer.step()
                progress.update()
            schedule.step()


@torch.no_grad()
def error_in_mw(model: nn.Module, data: Data, look_back: int) -> float:
    """RMSE of forecasts one hour ahead, on the test part."""
    rows = data.rows(data.test, look_back)
    lags = torch.arange(1 - look_back, 1)
    forecast = torch.cat([model(data.features[some[:, None] + lags]) for some in rows.split(512)])
    return float(rmse(data.in_mw(forecast) - data.demand[rows.numpy() + 1]))


def build(data: Data, args: argparse.Namespace) -> Forecaster:
    torch.manual_seed(args.seed)
    model = Forecaster(nn.LSTM, data.features.shape[1], args.hidden)
    return fastlstm.nn.convert(model)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--epochs", type=positive, default=2, help="epochs to train")
    parser.add_argument("--hidden", type=positive, default=32, help="hidden size of the LSTM")
    parser.add_argument("--look-back", type=positive, default=48, help="hours in a window")
    parser.add_argument(
        "--batch-size", type=positive, default=128, help="windows in a batch, over all processes"
    )
    parser.add_argument("--seed", type=int, default=0, help="for weights and batch order")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if "RANK" in os.environ:  # torchrun has set all that the processes need to meet
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if args.batch_size % ranks:
        raise SystemExit(f"--batch-size: expected a multiple of {ranks}, got {args.batch_size}")

    data = load("cpu")
    together = build(data, args)
    train(DistributedDataParallel(together), data, args, rank, ranks)
    dist.barrier()
    dist.destroy_process_group()
    if rank > 0:
        return

    alone = build(data, args)
    train(alone, data, args)
    largest = max(
        ((a - b).abs().max() / b.abs().max()).item()
        for a, b in zip(together.parameters(), alone.parameters(), strict=True)
    )
    errors = [error_in_mw(model, data, args.look_back) for model in (together, alone)]
    verdict = "equals" if largest < ROUNDING else "DIFFERS FROM"
    print(
        f"training on {ranks} process{'es' if ranks > 1 else ''} {verdict} training on one: "
        f"weights differ by at most {largest:.1e} of the largest beside them,\n"
        f"test errors by {abs(errors[0] - errors[1]):.1e} MW of {errors[1]:.2f} (one hour ahead)"
    )
    if largest >= ROUNDING:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
