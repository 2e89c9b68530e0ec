"""The implementations that are compared, each brought to one form.

A peer turns a problem into `Prepared`: a call without arguments, which is what gets timed, and
the way to read its results. Inference is x -> y, h_n, c_n with nothing kept for a backward pass;
training is that and the gradients of <y, grad_y> for x and every weight. States start at zero.
Packages are imported where they are used, so that one that is not installed is not needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
from cases import Arrays, Problem


class Prepared(NamedTuple):
    call: Callable[[], Any]
    results: Callable[[Any], Arrays]  # of what call() returned: "y", and "grad ..." in training
    forward: Callable[[], Any] | None = None  # of training, the part that keeps for backward
    module_call: tuple[Any, ...] = ()  # the module and its input, where there is one


def torch_call(
    forward: Callable[[], Any],
    output: Callable[[Any], Any],
    leaves: dict[str, Any],
    grad_y: Any,
    training: bool,
) -> Prepared:
    """`output` takes y out of what `forward` returns; leaves have the gradients in the end."""
    if not training:
        return Prepared(forward, lambda result: {"y": numbers(output(result))})

    def step() -> Any:
        for leaf in leaves.values():  # what optimizer.zero_grad() does
            leaf.grad = None
        result = forward()
        output(result).backward(grad_y)
        return result

    def results(result: Any) -> Arrays:
        gradients = {f"grad {name}": numbers(leaf.grad) for name, leaf in leaves.items()}
        return {"y": numbers(output(result)), **gradients}

    return Prepared(step, results, forward)


def numbers(tensor: Any) -> Any:
    """The numbers of a tensor in float64: an array, or a tensor where it is on another device."""
    doubles = tensor.detach().double()
    return doubles if doubles.is_cuda else doubles.numpy()


def torch_module(module_class: type, problem: Problem, training: bool) -> Prepared:
    """`module_class` is torch.nn.LSTM or a drop-in for it; the problem has arrays or tensors."""
    import torch
    from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

    case = problem.case
    x, grad_y = torch.as_tensor(problem.x), torch.as_tensor(problem.grad_y)
    module = module_class(
        case.D,
        case.H,
        case.num_layers,
        bidirectional=case.bidirectional,
        proj_size=case.proj_size,
        device=x.device,
        dtype=x.dtype,
    )
    module.load_state_dict({n: torch.as_tensor(w) for n, w in problem.weights.items()})
    sizes = None
    if case.shortest:
        x, sizes, *_ = pack_padded_sequence(x, case.lengths)
        grad_y = pack_padded_sequence(grad_y, case.lengths).data
    leaves = {}
    if training:
        x = x.clone().requires_grad_()
        leaves = {"x": x, **dict(module.named_parameters())}
    else:
        module.eval()
    batch = x if sizes is None else PackedSequence(x, sizes)

    def output(result: Any) -> Any:
        return result[0] if sizes is None else result[0].data

    prepared = torch_call(lambda: module(batch), output, leaves, grad_y, training)
    return prepared._replace(module_call=(module, batch))


def torch_lstm(problem: Problem, training: bool, threads: int) -> Prepared:
    import torch

    return torch_module(torch.nn.LSTM, problem, training)


def fastlstm_module(problem: Problem, training: bool, threads: int) -> Prepared:
    import fastlstm.nn

    return torch_module(fastlstm.nn.LSTM, problem, training)


def fastlstm_numpy(problem: Problem, training: bool, threads: int) -> Prepared:
    import fastlstm

    case, x = problem.case, problem.x
    rnn = fastlstm.LSTM(
        case.D, case.H, case.num_layers, bidirectional=case.bidirectional, dtype=x.dtype
    )
    rnn.load_state_dict(problem.weights)
    return Prepared(lambda: rnn(x), lambda result: {"y": result[0]})


def onnx_lstm(problem: Problem) -> bytes:
    """The problem as an ONNX model with fixed shapes: x -> y, h_n, c_n."""
    from onnx import helper, numpy_helper

    case = problem.case
    constants: Arrays = {
        # Y of an ONNX LSTM is (T, directions, N, H); nn.LSTM's is (T, N, directions * H).
        "y_shape": np.array([case.T, case.N, case.directions * case.H]),
    }
    nodes, states_h, states_c = [], [], []

    def reorder(name: str) -> np.ndarray:
        i, f, g, o = np.split(problem.weights[name], 4)
        return np.concatenate([i, o, f, g])

    below = "x"
    for layer in range(case.num_layers):
        suffixes = case.suffixes(layer)
        W, R, B, Y = f"W{layer}", f"R{layer}", f"B{layer}", f"Y{layer}"
        constants[W] = np.stack([reorder(f"weight_ih{s}") for s in suffixes])
        constants[R] = np.stack([reorder(f"weight_hh{s}") for s in suffixes])
        constants[B] = np.stack(
            [np.concatenate([reorder(f"bias_ih{s}"), reorder(f"bias_hh{s}")]) for s in suffixes]
        )
        states_h.append(f"h{layer}")
        states_c.append(f"c{layer}")
        y = "y" if layer == case.num_layers - 1 else f"y{layer}"
        direction = "bidirectional" if case.bidirectional else "forward"
        nodes += [
            helper.make_node(
                "LSTM",
                [below, W, R, B],
                [Y, states_h[-1], states_c[-1]],
                hidden_size=case.H,
                direction=direction,
            ),
            helper.make_node("Transpose", [Y], [f"{Y}t"], perm=[0, 2, 1, 3]),
            helper.make_node("Reshape", [f"{Y}t", "y_shape"], [y]),
        ]
        below = y
    nodes += [
        helper.make_node("Concat", states_h, ["h_n"], axis=0),
        helper.make_node("Concat", states_c, ["c_n"], axis=0),
    ]

    element = helper.np_dtype_to_tensor_dtype(problem.x.dtype)
    state_shape = [case.num_layers * case.directions, case.N, case.H]
    graph = helper.make_graph(
        nodes,
        "lstm",
        [helper.make_tensor_value_info("x", element, problem.x.shape)],
        [
            helper.make_tensor_value_info("y", element, problem.grad_y.shape),
            helper.make_tensor_value_info("h_n", element, state_shape),
            helper.make_tensor_value_info("c_n", element, state_shape),
        ],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    # Opset 17 and IR 8 are old enough for every reader and need nothing newer.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def onnxruntime_session(problem: Problem, training: bool, threads: int) -> Prepared:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Its idle workers spin for some 50 ms after a run and would take the core from the next peer.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(
        onnx_lstm(problem), options, providers=["CPUExecutionProvider"]
    )
    feed = {"x": problem.x}
    return Prepared(lambda: session.run(None, feed), lambda result: {"y": result[0]})


def openvino_request(problem: Problem, training: bool, threads: int) -> Prepared:
    import openvino

    core = openvino.Core()
    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",  # it would take bfloat16 where the CPU has it
        "ENABLE_CPU_PINNING": False,  # the process is bound to its CPUs already
    }
    model = core.compile_model(core.read_model(onnx_lstm(problem)), "CPU", config)
    request = model.create_infer_request()
    feed = {0: problem.x}
    return Prepared(
        lambda: request.infer(feed, share_inputs=True, share_outputs=True),
        lambda result: {"y": result[0]},
    )


def jax_scan(problem: Problem, training: bool, threads: int) -> Prepared:
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", problem.x.dtype == np.float64)
    case = problem.case

    def transposed(name: str, array: Any) -> Any:
        """JAX models keep weights as (in, out)."""
        return array.T if name.startswith("weight") else array

    def layer(params: Any, suffix: str, x: Any) -> Any:
        gx = x @ params[f"weight_ih{suffix}"]
        gx += params[f"bias_ih{suffix}"] + params[f"bias_hh{suffix}"]

        def step(state: Any, gx_t: Any) -> Any:
            h, c = state
            i, f, g, o = jnp.split(gx_t + h @ params[f"weight_hh{suffix}"], 4, axis=1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zero = jnp.zeros((case.N, case.H), x.dtype)
        state, y = jax.lax.scan(step, (zero, zero), gx, reverse=suffix.endswith("reverse"))
        return y, state

    def lstm(params: Any, x: Any) -> Any:
        states = []
        for index in range(case.num_layers):
            outputs = [layer(params, suffix, x) for suffix in case.suffixes(index)]
            x = jnp.concatenate([y for y, _ in outputs], axis=2)
            states += [state for _, state in outputs]
        return x, states

    params = {n: jnp.asarray(transposed(n, w)) for n, w in problem.weights.items()}
    x, grad_y = jnp.asarray(problem.x), jnp.asarray(problem.grad_y)
    if not training:
        forward = jax.jit(lstm)
        return Prepared(
            lambda: jax.block_until_ready(forward(params, x)),
            lambda result: {"y": np.asarray(result[0])},
        )

    def loss(params: Any, x: Any, grad_y: Any) -> Any:
        y, _ = lstm(params, x)
        return jnp.vdot(y, grad_y), y

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))

    def results(result: Any) -> Arrays:
        (_, y), (grads, grad_x) = result
        weights = {f"grad {n}": np.asarray(transposed(n, g)) for n, g in grads.items()}
        return {"y": np.asarray(y), "grad x": np.asarray(grad_x), **weights}

    return Prepared(lambda: jax.block_until_ready(gradient(params, x, grad_y)), results)


@dataclass(frozen=True)
class Peer:
    title: str
    prepare: Callable[[Problem, bool, int], Prepared]
    packages: tuple[str, ...]  # what has to be installed
    modes: tuple[str, ...] = ("inference", "training")
    dtypes: tuple[str, ...] = ("float32", "float64")

    def installed(self) -> bool:
        return all(find_spec(package) is not None for package in self.packages)


ALL_DTYPES = ("float32", "float64", "bfloat16", "float16")
OURS = "fastlstm"  # every ratio is a peer's time over this one's
PEERS = {
    OURS: Peer("fastlstm", fastlstm_module, ("fastlstm", "torch"), dtypes=ALL_DTYPES),
    "numpy": Peer("fastlstm\nNumPy", fastlstm_numpy, ("fastlstm",), ("inference",)),
    "torch": Peer("nn.LSTM", torch_lstm, ("torch",), dtypes=ALL_DTYPES),
    # Neither has a float64 LSTM: onnxruntime refuses it, openvino computes in float32.
    "onnxruntime": Peer(
        "onnxruntime", onnxruntime_session, ("onnx", "onnxruntime"), ("inference",), ("float32",)
    ),
    "openvino": Peer(
        "openvino", openvino_request, ("onnx", "openvino"), ("inference",), ("float32",)
    ),
    "jax": Peer("jax", jax_scan, ("jax",)),
}
