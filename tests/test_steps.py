"""Loops over single steps, whose weights come through one node of the graph (_steps.py)."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

torch = pytest.importorskip("torch", reason="tests of the torch side")
import fastlstm.nn  # noqa: E402
from fastlstm import _steps  # noqa: E402
from helpers_torch import D, H, N, assert_close, every_dtype, pair  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

KINDS = {"cell": (True, 1), "layer": (False, 1), "two layers": (False, 2)}
every_kind = pytest.mark.parametrize("cell, layers", KINDS.values(), ids=KINDS)
STEPS = 7


@pytest.fixture(autouse=True)
def from_the_second_step(monkeypatch):
    """Small weights, and no steps on their own but the first."""
    monkeypatch.setattr(_steps, "_LEAST", 0)
    monkeypatch.setattr(_steps, "_WORTH", 1)


def twins(cell, layers=1, **kwargs):
    return pair(D, H, **({} if cell else {"num_layers": layers}), cell=cell, **kwargs)


def steps(module, x, state=None, call=None):
    """Every h and the last state of calls for one step each."""
    outputs = []
    for x_t in x.unbind():
        if isinstance(module, torch.nn.LSTMCell):
            state = (call or module)(x_t, state)
            outputs.append(state[0])
        else:
            y, state = (call or module)(x_t[None], state)
            outputs.append(y[0])
    return torch.stack(outputs), state


def inputs(module, count=STEPS, dtype=torch.float32, batch=N):
    lead = () if isinstance(module, torch.nn.LSTMCell) else (module.num_layers,)
    torch.manual_seed(1)
    x = torch.randn(count, batch, D, dtype=dtype)
    return x, (torch.randn(*lead, batch, H, dtype=dtype), torch.randn(*lead, batch, H, dtype=dtype))


def gradients(module, x, state, loss=None, **kwargs):
    """Of the input, the state and the weights that want them, None for those of the others."""
    x, *state = (tensor.detach().clone().requires_grad_() for tensor in (x, *(state or ())))
    y, (h, c) = steps(module, x, tuple(state) or None, **kwargs)
    leaves = [x, *state, *(p for p in module.parameters() if p.requires_grad)]
    for leaf in leaves:
        leaf.grad = None
    total = loss(y, h, c) if loss else y.sin().sum() + h.square().sum() + c.cos().sum()
    total.backward()
    return [leaf.grad for leaf in leaves]


def nodes(tensor):
    """The names of all nodes of a graph."""
    found, left = {}, [tensor.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found[node] = node.name()
            left += [after for after, _ in node.next_functions]
    return list(found.values())


@every_kind
@every_dtype
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("given", [True, False], ids=["state", "no state"])
def test_equals_torch(cell, layers, dtype, bias, given):
    ours, theirs = twins(cell, layers, bias=bias, dtype=dtype)
    for batch in (1, N, 20):
        x, state = inputs(ours, dtype=dtype, batch=batch)
        state = state if given else None
        y, _ = steps(ours, x.requires_grad_(), state)
        assert nodes(y).count("WeightsBackward") == layers
        expected = gradients(theirs, x, state)
        assert_close(gradients(ours, x, state), expected, scale=STEPS)


@every_kind
def test_what_makes_a_loop(cell, layers):
    """A state that comes from the step before, as it is or masked; no calls beside one another."""
    ours, theirs = twins(cell, layers)
    x, state = inputs(ours)

    def masked(module):
        y, before = [], state
        for x_t in x.split(1):
            h, before = steps(module, x_t, before)
            before = tuple(part * (torch.arange(N) % 2).view(N, 1) for part in before)
            y.append(h)
        return torch.cat(y)

    def beside(module):
        return torch.cat([steps(module, x_t, state)[0] for x_t in x.split(1)])

    for function, shared in ((masked, True), (beside, False)):
        y, expected = function(ours), function(theirs)
        assert ("WeightsBackward" in nodes(y)) == shared
        y.square().sum().backward()
        expected.square().sum().backward()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert_close(a.grad, b.grad, scale=4 * STEPS)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kind", [{"proj_size": 2}, {"bidirectional": True}], ids=str)
def test_layers_that_do_not_share(bias, kind):
    ours, theirs = pair(D, H, bias=bias, **kind)
    torch.manual_seed(0)
    x, found = torch.randn(STEPS, N, D), []
    for module in (ours, theirs):
        y, state = 0, None
        for x_t in x.split(1):
            out, state = module(x_t, state)
            y = y + out
        assert "WeightsBackward" not in nodes(y)
        y.square().sum().backward()
        found.append([parameter.grad for parameter in module.parameters()])
    assert_close(*found, scale=4 * STEPS)


def test_the_graph_of_others():
    """Nodes with attributes of their own, and a wide one."""
    ours, theirs = twins(True)

    class Placed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor):
            ctx.place = ctx.graph = torch.zeros(3)
            return tensor.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad

    x, state = inputs(ours)
    found = []
    for module in (ours, theirs):
        y, last = steps(module, x, state)
        h = Placed.apply(last[0]) + torch.stack([*y.unbind()] * 20).mean(0)
        steps(module, x, (h, last[1]))[0].sum().backward()
        found.append([parameter.grad for parameter in module.parameters()])
    assert_close(*found, scale=4 * STEPS)


def test_a_weight_that_becomes_a_leaf_on_the_way():
    ours, theirs = twins(True)
    x, state = inputs(ours)
    found = []
    for module in (ours, theirs):
        weights = {name: p.detach() * 1 for name, p in module.named_parameters()}
        source = weights["weight_ih"].requires_grad_()
        weights["weight_ih"] = weight = source * 1

        def call(x_t, state, module=module, weights=weights):
            return torch.func.functional_call(module, weights, (x_t, state))

        y, middle = steps(module, x[:4], state, call)
        weight.detach_().requires_grad_()
        (y.sum() + steps(module, x[4:], middle, call)[0].sum()).backward()
        found.append([source.grad, weight.grad])
    assert_close(*found, scale=STEPS)


def test_backward_in_inference_mode():
    ours, theirs = twins(True)
    x, state = inputs(ours)
    found = []
    for module in (ours, theirs):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), lambda t: t.clone()):
            total = steps(module, x, state)[0].sum()
        with torch.inference_mode():
            found.append([*torch.autograd.grad(total, list(module.parameters()))])
    assert_close([g.clone() for g in found[0]], [g.clone() for g in found[1]], scale=STEPS)


@every_kind
def test_factors_are_multiplied_on_the_way(monkeypatch, cell, layers):
    ours, theirs = twins(cell, layers)
    x, state = inputs(ours, 40)
    expected = gradients(theirs, x, state)
    largest = []
    leave = _steps.Steps.leave

    def watched(self, *factors):
        leave(self, *factors)
        largest.append(max(len(left.factors) for left in self._left.values()))

    monkeypatch.setattr(_steps.Steps, "leave", watched)
    for rows, most in ((1, 0), (5 * N, 4), (1024, 39)):
        monkeypatch.setattr(_steps, "_ROWS", rows)
        largest.clear()
        assert_close(gradients(ours, x, state), expected, scale=40)
        assert max(largest) == most


@every_kind
@pytest.mark.parametrize("frozen", [(0,), (1,), (2, 3), (0, 1, 2), (0, 1, 2, 3)], ids=str)
def test_frozen_weights(cell, layers, frozen):
    ours, theirs = twins(cell, layers)
    for module in (ours, theirs):
        for k, parameter in enumerate(module.parameters()):
            parameter.requires_grad_(k not in frozen)
    x, state = inputs(ours)
    assert_close(gradients(ours, x, state), gradients(theirs, x, state), scale=STEPS)


@every_kind
def test_a_backward_pass_that_wants_a_part(cell, layers):
    ours, theirs = twins(cell, layers)
    x, state = inputs(ours)
    x.requires_grad_()
    results = [steps(module, x, state)[0].square().sum() for module in (ours, theirs)]
    for wanted in ("x", "weight_hh", "bias_ih", "weight_ih"):
        found = []
        for module, loss in zip((ours, theirs), results, strict=True):
            named = dict(module.named_parameters()).items()
            leaf = x if wanted == "x" else next(p for name, p in named if name.startswith(wanted))
            found.append(torch.autograd.grad(loss, leaf, retain_graph=True))
        assert_close(*found, scale=STEPS)
        graphs = [one for one in gc.get_objects() if type(one) is _steps.Graph]
        assert graphs
        assert not any(graph.node.steps._left for graph in graphs)  # what nobody multiplies


@every_kind
def test_again_and_again_through_one_graph(cell, layers):
    ours, theirs = twins(cell, layers)
    x, state = inputs(ours)
    for module in (ours, theirs):
        y, _ = steps(module, x, state)
        for part in (y[2].sum(), y.sum(), y[-1].square().sum()):
            part.backward(retain_graph=True)
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    for a, b in pairs:
        assert_close(a.grad, b.grad, scale=STEPS)


@every_kind
def test_gradients_of_gradients(cell, layers):
    ours, theirs = twins(cell, layers, dtype=torch.float64)
    x, state = inputs(ours, 4, torch.float64)

    def second(module):
        parameters = list(module.parameters())
        leaf = x.detach().requires_grad_()
        y, _ = steps(module, leaf, state)
        first = torch.autograd.grad(y.square().sum(), [leaf, *parameters], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), [leaf, *parameters])

    assert_close(second(ours), second(theirs), scale=100)


def test_batched_gradients():
    ours, theirs = twins(True)
    x, state = inputs(ours)
    found = []
    for module in (ours, theirs):
        y, _ = steps(module, x, state)
        many = torch.eye(N * H).view(-1, N, H)
        found.append(
            torch.autograd.grad(y[-1], list(module.parameters()), many, is_grads_batched=True)
        )
    assert_close(*found, scale=STEPS)


@every_kind
def test_weights_that_change_on_the_way(cell, layers):
    """In place, which torch forbids; by .data, which counts from the next step; and frozen."""
    ours, theirs = twins(cell, layers)
    x, state = inputs(ours)

    def changing(change):
        def run(module):
            y, middle = steps(module, x[:4], state)
            change(next(iter(module.parameters())))
            z, _ = steps(module, x[4:], middle)
            for parameter in module.parameters():
                parameter.grad = None
            (y.sum() + z.square().sum()).backward()
            return [parameter.grad for parameter in module.parameters()]

        return [run(module) for module in (ours, theirs)]

    def replace(parameter):
        parameter.data = parameter.data + 0.1

    assert_close(*changing(lambda parameter: parameter.requires_grad_(False)), scale=STEPS)
    assert_close(*changing(lambda parameter: parameter.requires_grad_(True)), scale=STEPS)
    (_, middle), (_, expected) = (steps(module, x[:4], state) for module in (ours, theirs))
    for module in (ours, theirs):
        replace(next(iter(module.parameters())))
    assert_close(steps(ours, x[4:], middle)[0], steps(theirs, x[4:], expected)[0], scale=STEPS)

    def in_place(parameter):
        with torch.no_grad():
            parameter.mul_(1.1)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        changing(in_place)


def test_a_weight_that_is_replaced_on_the_way():
    ours, theirs = twins(True)
    x, state = inputs(ours)
    found = []
    for module in (ours, theirs):
        first = module.weight_ih
        _, middle = steps(module, x[:4], state)
        module.weight_ih = torch.nn.Parameter(first.detach() + 0.1)
        steps(module, x[4:], middle)[0].square().sum().backward()
        found.append([first.grad, *(parameter.grad for parameter in module.parameters())])
    assert_close(*found, scale=STEPS)


def test_one_weight_of_two_cells():
    """One of which has no bias: each has a node of its own."""
    found = []
    for one, two in zip(twins(True), twins(True, bias=False), strict=True):
        two.weight_ih, two.weight_hh = one.weight_ih, one.weight_hh
        x, state = inputs(one, 14)
        for k, x_t in enumerate(x):
            state = (one, two)[k // 3 % 2](x_t, state)
        state[0].square().sum().backward()
        found.append([parameter.grad for parameter in one.parameters()])
    assert_close(*found, scale=2 * STEPS)


def test_a_cell_and_a_layer_of_the_same_weights():
    found = []
    for cell, layer in zip(twins(True), twins(False), strict=True):
        layer.weight_ih_l0, layer.weight_hh_l0 = cell.weight_ih, cell.weight_hh
        layer.bias_ih_l0, layer.bias_hh_l0 = cell.bias_ih, cell.bias_hh
        x, (h, c) = inputs(cell)
        for first, then in ((cell, layer), (layer, cell)):
            _, state = steps(first, x, (h, c) if first is cell else (h[None], c[None]))
            h, c = (tensor.view(N, H) for tensor in state)
            y, _ = steps(then, x, (h, c) if then is cell else (h[None], c[None]))
        y.square().sum().backward()
        found.append([parameter.grad for parameter in cell.parameters()])
    assert_close(*found, scale=4 * STEPS)


def test_training():
    """Loops, each after a step of an optimizer, with states that are carried on."""
    ours, theirs = twins(True)
    x, _ = inputs(ours, 30)
    for module in (ours, theirs):
        optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
        state = None
        for part in x.split(6):
            optimizer.zero_grad()
            y, state = steps(module, part, state)
            y.square().sum().backward()
            optimizer.step()
            state = tuple(tensor.detach() for tensor in state)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(a.detach(), b.detach(), scale=100)


def test_hooks_and_leaves_see_one_gradient():
    ours, theirs = twins(True)
    x, state = inputs(ours)
    found = []
    for module in (ours, theirs):
        seen = []
        hooks = [p.register_hook(lambda grad, seen=seen: seen.append(grad.clone())) for p in
                 module.parameters()]  # fmt: skip
        for p in module.parameters():
            p.register_post_accumulate_grad_hook(lambda p, seen=seen: seen.append(p.grad.clone()))
        steps(module, x, state)[0].sum().backward()
        assert len(seen) == 2 * len(hooks)
        found.append(sorted(seen, key=lambda grad: (grad.dim(), grad.sum().item())))
    assert_close(*found, scale=STEPS)


def test_a_tied_weight():
    ours, theirs = pair(H, H, cell=True)
    for module in (ours, theirs):
        module.weight_ih = module.weight_hh
    torch.manual_seed(0)
    x = torch.randn(STEPS, N, H)
    found = []
    for module in (ours, theirs):
        steps(module, x)[0].square().sum().backward()
        found.append([p.grad for p in module.parameters()])
    assert len(found[0]) == 3
    assert_close(*found, scale=STEPS)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpoints(reentrant):
    ours, theirs = twins(True)
    x, state = inputs(ours)

    def call(x_t, state):
        def one(x_t, *state):
            return ours(x_t, state)

        return checkpoint(one, x_t, *state, use_reentrant=reentrant)

    assert_close(gradients(ours, x, state, call=call), gradients(theirs, x, state), scale=STEPS)

    def all_steps(x, *state):
        return steps(ours, x, state)[0]

    x.requires_grad_()
    y = checkpoint(all_steps, x, *state, use_reentrant=reentrant)
    found = torch.autograd.grad(y.sum(), x) if not reentrant else (y.sum().backward(), x.grad)[1:]
    assert_close(found, torch.autograd.grad(steps(theirs, x, state)[0].sum(), x), scale=STEPS)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of torch's own doing
def test_compiled_autograd():
    ours, theirs = twins(True)
    x, state = inputs(ours, 4)
    loss = steps(ours, x, state)[0].square().sum()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward()
    steps(theirs, x, state)[0].square().sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(a.grad, b.grad, scale=STEPS)


def test_an_error_on_the_way():
    ours, theirs = twins(True)
    x, state = inputs(ours)

    class Stops(torch.autograd.Function):
        stops = True

        @staticmethod
        def forward(ctx, h):
            return h.clone()

        @staticmethod
        def backward(ctx, grad):
            if Stops.stops:
                raise RuntimeError("stops here")
            return grad

    y, state_then = steps(ours, x[:3], state)
    stopping = Stops.apply(state_then[0])
    z, _ = steps(ours, x[3:], (stopping, state_then[1]))
    loss = y.sum() + z.sum()
    with pytest.raises(RuntimeError, match="stops here"):
        loss.backward(retain_graph=True)
    Stops.stops = False
    loss.backward()
    steps(theirs, x, state)[0].sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(a.grad, b.grad, scale=STEPS)


@every_kind
def test_an_input_that_changes_between_its_step_and_the_product(cell, layers):
    """As torch allows it: what a step keeps is its own once its node has run."""

    def run(module):
        x, state = inputs(module)
        x = [x_t.clone() for x_t in x]
        for k, x_t in enumerate(x):
            y, state = steps(module, x_t[None], state)
            if k == 3:  # after the steps behind it

                def change(grad, later=x[5]):
                    later.add_(1)

                y.register_hook(change)
        y.sum().backward()
        return [parameter.grad for parameter in module.parameters()]

    ours, theirs = twins(cell, layers)
    assert_close(run(ours), run(theirs), scale=STEPS)


@every_kind
def test_hooks_that_unpack_into_the_same_memory(cell, layers):
    """As those that bring back what was offloaded; NumPy writes without a new version."""

    def run(module):
        room = {}

        def unpack(saved):
            places = room.setdefault((saved.shape, saved.dtype), [])
            if len(places) < 16:  # more than one node unpacks
                places.append(torch.empty_like(saved))
            else:
                places.append(places.pop(0))
            places[-1].numpy()[...] = saved.numpy()
            return places[-1]

        x, state = inputs(module, 40)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), unpack):
            y, _ = steps(module, x, state)
        y.square().sum().backward()
        return [parameter.grad for parameter in module.parameters()]

    ours, theirs = twins(cell, layers)
    assert_close(run(ours), run(theirs), scale=40)


def test_copies_and_files_of_a_module_amid_a_loop():
    ours, _ = twins(True)
    x, state = inputs(ours)
    y, last = steps(ours, x, state)
    middle = tuple(tensor.detach() for tensor in last)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for other in (copy.deepcopy(ours), torch.load(file, weights_only=False)):
        z, _ = steps(other, x, middle)
        z.sum().backward()
        assert all(p.grad is not None for p in other.parameters())
    assert all(p.grad is None for p in ours.parameters())
    y.sum().backward()


def test_a_graph_and_its_node_live_as_long_as_its_steps():
    ours, _ = twins(True)
    x, state = inputs(ours)
    y, last = steps(ours, x, state)
    graph = last[0].grad_fn.graph
    node = weakref.ref(graph.node)
    y.sum().backward()
    graph = weakref.ref(graph)
    assert graph()
    del y, last
    assert graph() is None and node() is None  # at once: there is no cycle


def test_an_error_on_the_way_keeps_no_graph():
    """What the steps left to the pass that ended would hold it, in a cycle that nobody sees."""
    ours, _ = twins(True)
    x, state = inputs(ours)
    y, last = steps(ours, x[:3], state)

    def stop(grad):
        raise KeyError

    last[0].register_hook(stop)
    z, last = steps(ours, x[3:], last)
    node = weakref.ref(last[0].grad_fn.graph.node)
    with pytest.raises(KeyError):
        z.sum().backward()
    del y, z, last
    gc.collect()
    assert node() is None


def test_threads_may_call_and_go_backward_at_once():
    ours, theirs = twins(True)
    x, state = inputs(ours)
    expected = gradients(theirs, x, state)

    def loop(_):
        y, (h, c) = steps(ours, x, state)
        total = y.sin().sum() + h.square().sum() + c.cos().sum()
        return list(torch.autograd.grad(total, list(ours.parameters())))

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(loop, range(40)):
            assert_close(found, expected[3:], scale=STEPS)


def test_same_bits_for_any_number_of_threads():
    ours = fastlstm.nn.LSTMCell(40, 70)
    torch.manual_seed(0)
    x = torch.randn(30, 40, 40)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append([grad.clone() for grad in gradients(ours, x, None)])
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


@pytest.mark.parametrize(
    ("size", "count", "shared"), [(64, 40, 0), (128, 6, 0), (128, 9, 3), (512, 3, 2)]
)
def test_which_steps_share_their_weights(monkeypatch, size, count, shared):
    """Not those of small weights, nor the first: alone they are as fast."""
    monkeypatch.undo()
    cell = fastlstm.nn.LSTMCell(size, size)
    y, _ = steps(cell, torch.randn(count, 1, size))
    names = nodes(y)
    assert names.count("StepBackward") == count - shared
    assert names.count("SharedBackward") == shared
    assert names.count("WeightsBackward") == min(shared, 1)
    left = []
    monkeypatch.setattr(_steps.Steps, "leave", lambda *factors: left.append(factors))
    monkeypatch.setattr(_steps.Steps, "take", lambda self: [None] * 4)
    y.sum().backward()
    assert len(left) == shared


def test_half_precision_keeps_its_own_way():
    ours, _ = twins(True, dtype=torch.bfloat16)
    x, state = inputs(ours, dtype=torch.bfloat16)
    y, _ = steps(ours, x, state)
    assert "WeightsBackward" not in nodes(y)


def test_weights_made_anew_for_each_step():
    ours, theirs = twins(True)
    for module in (ours, theirs):
        torch.nn.utils.parametrizations.weight_norm(module, "weight_hh")
    x, state = inputs(ours)
    assert_close(gradients(ours, x, state), gradients(theirs, x, state), scale=STEPS)
