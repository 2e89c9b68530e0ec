"""Train an LSTM with NumPy alone: no torch, a hand-written loss gradient and Adam.

Each sequence is a sine of unknown frequency and phase. At every step the network is asked for
the next value, so it has to find the frequency out from what it has seen. Takes a few seconds:

    python examples/numpy_only.py
"""

from __future__ import annotations

import fastlstm
import numpy as np

HIDDEN = 32
SEQ_LEN = 60  # T
BATCH = 32  # N
STEPS = 400
LEARNING_RATE = 1e-2

rng = np.random.default_rng(0)


def sine_batch(batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and the values one step later, each (T, N, 1)."""
    frequency = rng.uniform(0.1, 0.5, batch)
    phase = rng.uniform(0, 2 * np.pi, batch)
    wave = np.sin(np.arange(SEQ_LEN + 1)[:, None] * frequency + phase)[..., None]
    wave = wave.astype(np.float32)
    return wave[:-1], wave[1:]


class Adam:
    """Adam on a dict of arrays, which it updates in place."""

    def __init__(self, params: dict[str, np.ndarray], lr: float, betas=(0.9, 0.999), eps=1e-8):
        self.params, self.lr, self.betas, self.eps = params, lr, betas, eps
        self.mean = {name: np.zeros_like(p) for name, p in params.items()}
        self.square = {name: np.zeros_like(p) for name, p in params.items()}
        self.step_count = 0

    def step(self, grads: dict[str, np.ndarray]) -> None:
        self.step_count += 1
        beta1, beta2 = self.betas
        scale = (1 - beta2**self.step_count) ** 0.5 / (1 - beta1**self.step_count)
        for name, param in self.params.items():
            mean, square, grad = self.mean[name], self.square[name], grads[name]
            mean += (1 - beta1) * (grad - mean)
            square += (1 - beta2) * (grad * grad - square)
            param -= self.lr * scale * mean / (np.sqrt(square) + self.eps)


rnn = fastlstm.LSTM(1, HIDDEN, rng=rng)
readout_weight = rng.uniform(-1, 1, (HIDDEN, 1)).astype(np.float32) * HIDDEN**-0.5
readout_bias = np.zeros(1, np.float32)
# rnn.weights holds the live arrays: updating them in place trains the layer.
optimizer = Adam(
    {**rnn.weights, "readout_weight": readout_weight, "readout_bias": readout_bias},
    LEARNING_RATE,
)


def predict(x: np.ndarray) -> np.ndarray:
    hidden, _ = rnn(x)
    return hidden @ readout_weight + readout_bias


for step in range(STEPS + 1):
    x, target = sine_batch(BATCH)

    hidden, _, tape = rnn.forward(x)  # (T, N, H); the tape keeps what backward needs
    error = hidden @ readout_weight + readout_bias - target
    loss = np.mean(error**2)

    grad_prediction = 2 * error / error.size
    grads = rnn.backward(tape, grad_prediction @ readout_weight.T)
    optimizer.step(
        {
            **grads.weights,
            "readout_weight": np.einsum("tnh,tno->ho", hidden, grad_prediction),
            "readout_bias": grad_prediction.sum((0, 1)),
        }
    )
    if step % 50 == 0:
        print(f"step {step:4d}   loss {loss:.5f}")

x, target = sine_batch(1000)
settled = slice(SEQ_LEN // 2, None)  # by then the network has seen enough of each wave
model_rmse = np.sqrt(np.mean((predict(x) - target)[settled] ** 2))
persistence_rmse = np.sqrt(np.mean((x - target)[settled] ** 2))
print(f"1000 new waves, second half: RMSE {model_rmse:.4f} (last value: {persistence_rmse:.4f})")
