"""Recurrent layers as one op, and their cells.

All gates of all layers and directions share one atom: the hidden units. The rows of every weight
and bias are ``gates x hidden``, the recurrent weights' columns are hidden, the next layer's input
is ``[hidden | hidden]`` with two directions, and the state is one tensor for all layers, which is
why they have to keep the same units.

A unit whose rows are zero, and whose state begins at zero, stays zero (own):

- LSTM: i = f = o = 1/2 and g = 0, so c = c/2 + 0 = 0 and h = 1/2 tanh(0) = 0;
- GRU: z = 1/2 and n = tanh(0) = 0, so h = (1 - z) n + z h = h/2 = 0;
- tanh and relu: h = f(0) = 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import fx

from torchlathe.ir.axes.rule import UNKNOWN, ZERO, Layout, Rule, Terms, Value, Values, argument
from torchlathe.ir.axes.terms import Term

if TYPE_CHECKING:
    from torchlathe.ir.axes.flow import Flow
    from torchlathe.ir.axes.inference import Inference

__all__ = ["Recurrent", "RecurrentCell"]

GATE = "it numbers the gates of a recurrent layer"
LAYER = "it numbers the layers and directions of a recurrent network"
STEP = "its steps follow each other in a recurrent network"


@dataclass(frozen=True)
class _Weights:
    """The parameters of one layer and direction.

    Attributes:
        inputs: (gates * hidden, inputs).
        hidden: (gates * hidden, outputs).
        biases: Those that there are; (gates * hidden,).
        project: (outputs, hidden), or None where the outputs are the hidden units.
    """

    inputs: fx.Node
    hidden: fx.Node
    biases: tuple[fx.Node, ...] = ()
    project: fx.Node | None = None

    @property
    def rows(self) -> tuple[fx.Node, ...]:
        """Tensors whose axis 0 are gates of hidden units."""
        return (self.inputs, self.hidden, *self.biases)


def _list(arg: Any) -> list[fx.Node]:
    return list(arg) if isinstance(arg, list | tuple) else [arg]


class _Recurrence(Rule):
    """What layers and cells have in common."""

    def weights(self, node: fx.Node) -> list[list[_Weights]]:
        """The parameters, per layer and direction."""
        raise NotImplementedError

    def states(self, node: fx.Node) -> list[fx.Node]:
        """The initial states: outputs, and for an LSTM the cells."""
        return _list(argument(node, "hx"))

    def relate(
        self, node: fx.Node, inputs: Term, hidden: Term, outputs: Term, gates: Term, ax: Inference
    ) -> None:
        """Unify the axes of all parameters."""
        solver = ax.solver
        ax.layouts[node] = Layout(letters={"i": inputs, "h": hidden, "p": outputs})
        for layer in self.weights(node):
            for own in layer:
                for tensor in own.rows:
                    ax.unify(ax.terms(tensor)[0], solver.product((gates, hidden)))
                ax.unify(ax.terms(own.inputs)[1], inputs)
                ax.unify(ax.terms(own.hidden)[1], outputs)
                if own.project is None:
                    ax.unify(outputs, hidden)
                else:
                    ax.unify(ax.terms(own.project)[0], outputs)
                    ax.unify(ax.terms(own.project)[1], hidden)
            inputs = solver.concat([outputs] * len(layer))

    def check(self, node: fx.Node, inputs: Value | None, flow: Flow) -> tuple[Value, Value]:
        """Report what is lost; returns what outputs and cells hold at the erased units."""
        letters = flow.letters(node)
        if "i" in letters and (inputs is None or not inputs.is_zero):
            flow.lose(node, "its inputs are not zero at the erased indices")
        weights = [own for layer in self.weights(node) for own in layer]
        states = self.states(node)
        hidden = outputs = False
        if "h" in letters:
            rows = all(_zero(t, 0, flow) for own in weights for t in own.rows)
            hidden = rows and all(_zero(s, -1, flow) for s in states[1:] or states)
            outputs = hidden and weights[0].project is None
        if "p" in letters and weights[0].project is not None:
            outputs = all(_zero(own.project, 0, flow) for own in weights if own.project)
        if outputs:
            outputs = _zero(states[0], -1, flow)
        if ("h" in letters and not hidden) or ("p" in letters and not outputs):
            flow.lose(node, "its state is not zero at the erased units")
        return ZERO if outputs else UNKNOWN, ZERO if hidden else UNKNOWN

    def reads(self, node: fx.Node, operand: fx.Node, layout: Layout | None) -> set[int]:
        """Columns, which read inputs, outputs and hidden units."""
        matrices: list[fx.Node | None] = []
        for layer in self.weights(node):
            for own in layer:
                matrices += [own.inputs, own.hidden, own.project]
        found = {1} if operand in matrices else set()
        if operand is argument(node, "input"):
            return {operand.meta["val"].dim() - 1}
        return found


def _zero(node: fx.Node | None, axis: int, flow: Flow) -> bool:
    """Whether a tensor is zero at the erased indices of an axis."""
    if node is None:
        return False
    value = flow.value(node, axis % flow.rank(node))
    return value is not None and value.is_zero


@dataclass(frozen=True)
class Recurrent(_Recurrence):
    """``lstm``, ``gru``, ``rnn_tanh`` and ``rnn_relu``, of any depth and in both directions.

    Attributes:
        gates: Blocks of rows of each weight.
    """

    gates: int

    def weights(self, node: fx.Node) -> list[list[_Weights]]:
        """Cut the list of parameters."""
        params = _list(argument(node, "params"))
        layers = argument(node, "num_layers")
        directions = 2 if argument(node, "bidirectional") else 1
        count = len(params) // (layers * directions)
        biased = bool(argument(node, "has_biases"))
        found = []
        for start in range(0, len(params), count):
            own = params[start : start + count]
            biases = tuple(own[2:4]) if biased else ()
            project = own[-1] if count == 3 + len(biases) else None
            found.append(_Weights(own[0], own[1], biases, project))
        return [found[i : i + directions] for i in range(0, len(found), directions)]

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """Steps and layers are fixed; the batch passes; outputs are those of all directions."""
        states = [ax.terms(s) for s in self.states(node)]
        x = ax.terms(argument(node, "input"))
        outputs, hidden = states[0][-1], states[-1][-1]
        gates = ax.fresh(self.gates)
        ax.pin(gates, GATE)
        batch = 0 if argument(node, "batch_first") else 1
        ax.pin(x[1 - batch], STEP)
        for state in states:
            ax.unify(x[batch], state[1])
        ax.pin_all([s[0] for s in states], LAYER)
        self.relate(node, x[-1], hidden, outputs, gates, ax)
        directions = len(self.weights(node)[0])
        result = ax.solver.concat([outputs] * directions)
        rows: list[tuple[Term, ...] | None] = [(*x[:-1], result)]
        for state, value in zip(states, node.meta["val"][1:], strict=True):
            # Fake tensors of torch 2.11 say that the states of an lstm have an axis more.
            lead = [ax.fresh(d) for d in value.shape[: value.dim() - len(state)]]
            ax.pin_all(lead, LAYER)
            rows.append((*lead, *state))
        return rows

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """Hidden units are zero if all their rows and the states that they begin with are."""
        source = argument(node, "input")
        inputs = flow.value(source, flow.rank(source) - 1)
        output, cell = self.check(node, inputs, flow)
        unknown = flow.unknown(node)
        assert isinstance(unknown, list)
        values = [output, output, cell][: len(unknown)]
        return [_last(row, value) for row, value in zip(unknown, values, strict=True)]


def _last(row: Sequence[Value | None], value: Value) -> tuple[Value | None, ...]:
    return (*row[:-1], None if row[-1] is None else value)


@dataclass(frozen=True)
class RecurrentCell(_Recurrence):
    """``lstm_cell``, ``gru_cell``, ``rnn_tanh_cell`` and ``rnn_relu_cell``: one step.

    Attributes:
        gates: Blocks of rows of each weight.
    """

    gates: int

    def weights(self, node: fx.Node) -> list[list[_Weights]]:
        """The one layer."""
        biases = [argument(node, name) for name in ("b_ih", "b_hh")]
        found = tuple(b for b in biases if isinstance(b, fx.Node))
        return [[_Weights(argument(node, "w_ih"), argument(node, "w_hh"), found)]]

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """The batch passes; the state keeps its units."""
        states = [ax.terms(s) for s in self.states(node)]
        x = ax.terms(argument(node, "input"))
        gates = ax.fresh(self.gates)
        ax.pin(gates, GATE)
        for state in states:
            ax.unify(x[0], state[0])
        hidden = states[0][-1]
        for state in states[1:]:
            ax.unify(hidden, state[-1])
        self.relate(node, x[-1], hidden, hidden, gates, ax)
        result = (x[0], hidden)
        return [result for _ in states] if len(states) > 1 else result

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """Hidden units are zero if all their rows and the states that they begin with are."""
        source = argument(node, "input")
        inputs = flow.value(source, flow.rank(source) - 1)
        output, cell = self.check(node, inputs, flow)
        unknown = flow.unknown(node)
        if isinstance(unknown, list):
            return [_last(r, v) for r, v in zip(unknown, (output, cell), strict=True)]
        return _last(unknown, output)
