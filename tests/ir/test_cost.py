"""The cost model against torch's own FLOP counter, and its own rules where torch has none."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from torchlathe.ir import InputError, TensorKind, capture
from torchlathe.ir.cost import Cost, NodeCost

R = torch.randn


def counted(model, *args, **kwargs):
    """What torch counts; the fused CPU attention has no formula there, its plain form has."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as mode:
        model(*args, **kwargs)
    return mode.get_total_flops()


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def module_of(function):
    return (function if isinstance(function, nn.Module) else Function(function)).eval()


# -- single ops against the FLOP counter -----------------------------------------------------

EXACT = {
    "linear-1d": (nn.Linear(5, 3), R(5)),
    "linear-3d": (nn.Linear(5, 3), R(2, 4, 5)),
    "linear-no-bias": (nn.Linear(5, 3, bias=False), R(2, 5)),
    "mm": (torch.mm, R(3, 5), R(5, 4)),
    "bmm": (torch.bmm, R(2, 3, 5), R(2, 5, 4)),
    "addmm": (torch.addmm, R(4), R(2, 3), R(3, 4)),
    "baddbmm": (torch.baddbmm, R(2, 3, 4), R(2, 3, 5), R(2, 5, 4)),
    "matmul-1d-2d": (torch.matmul, R(5), R(5, 4)),
    "matmul-1d-3d": (torch.matmul, R(5), R(2, 5, 4)),
    "matmul-3d-2d": (torch.matmul, R(2, 3, 5), R(5, 4)),
    "matmul-2d-3d": (torch.matmul, R(3, 5), R(2, 5, 4)),
    "matmul-broadcast": (torch.matmul, R(7, 1, 3, 5), R(2, 5, 4)),
    "tensordot": (lambda a, b: torch.tensordot(a, b, ([1, 2], [0, 1])), R(3, 5, 6), R(5, 6, 4)),
    "tensordot-outer": (lambda a, b: torch.tensordot(a, b, 0), R(3, 5), R(4)),
    "inner": (torch.inner, R(2, 3, 5), R(4, 5)),
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1), R(2, 4, 9)),
    "conv2d-strided": (nn.Conv2d(4, 6, 3, stride=2, dilation=2), R(2, 4, 19, 17)),
    "conv2d-same": (nn.Conv2d(4, 6, 3, padding="same"), R(2, 4, 9, 9)),
    "conv2d-unbatched": (nn.Conv2d(4, 6, 3), R(4, 9, 9)),
    "conv2d-depthwise": (nn.Conv2d(4, 8, 3, groups=4), R(2, 4, 9, 9)),
    "conv3d-grouped": (nn.Conv3d(4, 6, 3, groups=2), R(2, 4, 5, 6, 7)),
    "conv-transpose1d": (nn.ConvTranspose1d(4, 6, 3, stride=2), R(2, 4, 9)),
    "conv-transpose2d-grouped": (nn.ConvTranspose2d(4, 6, 3, 2, groups=2), R(2, 4, 9, 9)),
    "conv-transpose2d-unbatched": (nn.ConvTranspose2d(4, 6, 3), R(4, 9, 9)),
    "conv-transpose3d": (nn.ConvTranspose3d(4, 6, 3), R(2, 4, 3, 4, 5)),
    "sdpa": (F.scaled_dot_product_attention, R(2, 4, 5, 8), R(2, 4, 6, 8), R(2, 4, 6, 7)),
    "sdpa-3d": (F.scaled_dot_product_attention, R(4, 5, 8), R(4, 6, 8), R(4, 6, 8)),
    "sdpa-causal": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        *(R(2, 4, 5, 8), R(2, 4, 5, 8), R(2, 4, 5, 8)),
    ),
    "sdpa-gqa": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        *(R(2, 4, 5, 8), R(2, 2, 6, 8), R(2, 2, 6, 8)),
    ),
    "attention-module": (
        nn.MultiheadAttention(8, 2, batch_first=True),
        *(R(2, 3, 8), R(2, 3, 8), R(2, 3, 8)),
    ),
    "gru": (nn.GRU(5, 6, 2, bidirectional=True), R(4, 3, 5)),
    "rnn-unbatched": (nn.RNN(5, 6), R(3, 5)),
    "lstm-projected": (nn.LSTM(5, 6, 2, proj_size=3), R(4, 3, 5)),
    "lstm-cell": (nn.LSTMCell(5, 6), R(3, 5)),
    "gru-cell": (nn.GRUCell(5, 6), R(3, 5)),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("case", EXACT.values(), ids=EXACT)
def test_contraction_counts_as_torch_counts(case):
    function, *inputs = case
    model = module_of(function)
    expected = counted(model, *inputs)
    assert expected > 0
    assert capture(model, tuple(inputs)).cost().flops == expected


EQUATIONS = [
    ("ij,jk->ik", (3, 4), (4, 5)),
    ("ij,jk", (3, 4), (4, 5)),
    ("bhid,bhjd->bhij", (2, 3, 4, 5), (2, 3, 6, 5)),
    ("...ij,...jk->...ik", (2, 7, 3, 4), (7, 4, 5)),
    ("ij,ij->", (3, 4), (3, 4)),
    ("bij,jk->bk", (2, 3, 4), (4, 5)),
    ("ij,jk,kl->il", (3, 4), (4, 5), (5, 6)),
    ("abc,cd,de,ef->abf", (2, 3, 4), (4, 5), (5, 6), (6, 7)),
    ("bi,bj,bij->b", (2, 3), (2, 4), (2, 3, 4)),
    ("i,j->ij", (3,), (4,)),
    ("ij,ij->ij", (3, 4), (3, 4)),
    ("ij,j->i", (3, 1), (4,)),
    ("ii->i", (3, 3)),
]


@pytest.mark.parametrize("case", EQUATIONS, ids=lambda case: case[0])
def test_einsum_counts_as_torch_counts(case):
    equation, *shapes = case
    inputs = [R(*shape) for shape in shapes]
    model = module_of(lambda *tensors: torch.einsum(equation, *tensors))
    assert capture(model, tuple(inputs)).cost().flops == counted(model, *inputs)


def test_what_torch_has_no_formula_for_is_counted_alike():
    cases = [
        (torch.mv, (R(4, 5), R(5)), 2 * 4 * 5),
        (torch.dot, (R(5), R(5)), 2 * 5),
        (torch.matmul, (R(2, 3, 5), R(5)), 2 * 2 * 3 * 5),
        (torch.addbmm, (R(3, 4), R(2, 3, 5), R(2, 5, 4)), 2 * 2 * 3 * 5 * 4),
        (torch.bilinear, (R(2, 3), R(2, 4), R(5, 3, 4), None), 2 * 2 * 5 * 3 * 4),
    ]
    for function, inputs, expected in cases:
        model = module_of(function)
        assert counted(model, *inputs) == 0
        assert capture(model, inputs).cost().flops == expected


def test_grouped_products_count_each_row_once():
    cost = capture(
        module_of(lambda a, b, ends: torch._grouped_mm(a, b, offs=ends)),
        (
            R(32, 16).bfloat16(),
            R(4, 16, 8).bfloat16(),
            torch.tensor([8, 16, 24, 32], dtype=torch.int32),
        ),
    ).cost()
    assert cost.flops == 2 * 32 * 16 * 8


# -- whole models ----------------------------------------------------------------------------


def torchvision_model(name, **options):
    models = pytest.importorskip("torchvision").models
    return models.get_model(name, weights=None, **options).eval()


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_convolutional_networks(name):
    model = torchvision_model(name)
    image = R(1, 3, 32, 32)
    cost = capture(model, (image,), dynamic_shapes="auto").cost()
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    state = [*model.parameters(), *model.buffers()]
    assert cost.bytes == sum(t.numel() * t.element_size() for t in state)
    for batch in (2, 5):
        expected = counted(model, R(batch, 3, 32, 32))
        assert cost.flops_at({"s0": batch}) == expected


def test_vision_transformer():
    pytest.importorskip("torchvision")
    from torchvision.models.vision_transformer import VisionTransformer

    model = VisionTransformer(32, 8, 2, 4, 64, 128, num_classes=10).eval()
    cost = capture(model, (R(3, 3, 32, 32),), dynamic_shapes="auto").cost()
    # The module's fused fast path has no formula; the plain one runs where gradients may flow.
    for batch in (3, 7):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as mode:
            model(R(batch, 3, 32, 32))
        assert cost.flops_at({"s0": batch}) == mode.get_total_flops()


@pytest.fixture(scope="module")
def bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        num_hidden_layers=12,
        hidden_size=48,
        intermediate_size=96,
        num_attention_heads=4,
        vocab_size=50,
        max_position_embeddings=64,
    )
    return transformers.BertModel(config).eval()


@pytest.fixture(scope="module")
def bert_program(bert):
    ids = torch.randint(0, 50, (2, 16))
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=64)
    dims = {0: batch, 1: length}
    return capture(
        bert,
        (),
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        dynamic_shapes={"input_ids": dims, "attention_mask": dims},
    )


def test_bert_at_two_batch_sizes_and_lengths(bert, bert_program):
    cost = bert_program.cost()
    assert set(cost.symbols) == {"s0", "s1"}
    assert cost.flops_at() == counted(bert, *[torch.ones(2, 16, dtype=torch.long)] * 2)
    for batch, length in ((2, 16), (3, 16), (3, 40)):
        ids = torch.ones(batch, length, dtype=torch.long)
        expected = counted(bert, ids, ids)
        assert cost.flops_at({"s0": batch, "s1": length}) == expected
        by_symbol = {cost.symbols["s0"]: batch, cost.symbols["s1"]: length}
        assert cost.flops_at(by_symbol) == expected


def test_concrete_cost_is_the_symbolic_one_at_the_sizes(bert_program):
    cost = bert_program.cost()
    concrete = cost.at({"s0": 3, "s1": 20})
    assert concrete.flops == cost.flops_at({"s0": 3, "s1": 20})
    for field in ("flops", "other_flops"):
        total = sum(getattr(node, field) for node in concrete.nodes.values())
        assert type(getattr(concrete, field)) is int
        assert getattr(concrete, field) == total
    assert concrete.activation_bytes == sum(n.bytes_written for n in concrete.nodes.values())
    assert concrete.flops_at() == concrete.flops


def test_a_static_capture_costs_integers(bert, bert_program):
    ids = torch.ones(3, 20, dtype=torch.long)
    static = capture(bert, (), {"input_ids": ids, "attention_mask": ids}).cost()
    dynamic = bert_program.cost().at({"s0": 3, "s1": 20})
    assert type(static.flops) is int
    assert not static.symbols
    assert static.flops == static.flops_at() == dynamic.flops
    assert static.other_flops == dynamic.other_flops
    assert static.bytes == dynamic.bytes


def test_llama_with_grouped_queries():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        num_hidden_layers=2,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=50,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    cost = capture(model, (torch.ones(2, 6, dtype=torch.long),), dynamic_shapes="auto").cost()
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    for batch in (2, 5):
        ids = torch.ones(batch, 6, dtype=torch.long)
        assert cost.flops_at({"s0": batch}) == counted(model, ids)


class Mixture(nn.Module):
    """Transposed, grouped and depthwise convolutions, batched products and an einsum."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2, groups=4)
        self.mix = nn.Parameter(R(4, 4))

    def forward(self, x):
        y = self.up(torch.relu(self.depthwise(self.down(x))))
        rows = y.flatten(2)
        scores = torch.bmm(rows, rows.transpose(1, 2)).softmax(-1)
        mixed = torch.einsum("bij,jk->bik", scores, self.mix)
        return torch.baddbmm(rows, mixed, rows)


def test_hand_made_network_at_two_batch_sizes():
    model = Mixture().eval()
    cost = capture(model, (R(1, 4, 8, 8),), dynamic_shapes="auto").cost()
    for batch in (1, 6):
        assert cost.flops_at({"s0": batch}) == counted(model, R(batch, 4, 8, 8))


# -- what is not a contraction ---------------------------------------------------------------


def cost_of(function, *inputs):
    program = capture(module_of(function), inputs)
    return program.cost()


def only(cost):
    (node,) = cost.nodes.values()
    return node


def test_elementwise_ops_count_one_per_result():
    node = only(cost_of(lambda a, b: a + b, R(3, 4), R(4)))
    assert node == NodeCost(0, 12, 4 * 12 + 4 * 4, 4 * 12, 0)


def test_an_input_that_is_read_twice_counts_once():
    assert only(cost_of(lambda a: a * a, R(3, 4))).bytes_read == 4 * 12


def test_views_are_free_and_copies_are_not():
    free = [
        lambda a: a.transpose(0, 1),
        lambda a: a[1:],
        lambda a: a.reshape(12),
        lambda a: a.contiguous(),
        lambda a: a.to(torch.float32),
        lambda a: F.dropout(a, 0.5, training=False),
        lambda a: a.expand(5, 3, 4),
    ]
    for function in free:
        assert all(n == NodeCost() for n in cost_of(function, R(3, 4)).nodes.values())
    cost = cost_of(lambda a: a.t().reshape(12), R(3, 4))
    assert cost.nodes["reshape"] == NodeCost(0, 0, 48, 48)
    cast = only(cost_of(lambda a: a.to(torch.float64), R(3, 4)))
    assert cast == NodeCost(0, 0, 48, 96)


def test_a_table_is_read_where_it_is_looked_up():
    model = nn.Embedding(100, 4)
    node = only(capture(model, (torch.tensor([1, 2, 3]),)).cost())
    assert node.bytes_read == 3 * 8 + 3 * 4 * 4
    assert node.parameters == 400


def test_norms_pools_and_softmax_follow_their_table():
    image = R(2, 3, 8, 8)
    assert cost_of(nn.LayerNorm(8), image).other_flops == 8 * image.numel()
    assert cost_of(nn.BatchNorm2d(3), image).other_flops == 2 * image.numel()
    assert cost_of(lambda x: x.softmax(-1), image).other_flops == 5 * image.numel()
    assert cost_of(lambda x: x.sum(-1), image).other_flops == image.numel()
    assert cost_of(nn.AvgPool2d((2, 4)), image).other_flops == 2 * 3 * 4 * 2 * 8
    assert cost_of(nn.MaxPool2d(3, 1), image).other_flops == 2 * 3 * 6 * 6 * 9
    assert cost_of(nn.Softmax(1), image).flops == 0


def test_attention_counts_its_softmax_apart():
    q, k, v = R(2, 4, 5, 8), R(2, 4, 6, 8), R(2, 4, 6, 8)
    cost = cost_of(F.scaled_dot_product_attention, q, k, v)
    assert cost.other_flops == 5 * 2 * 4 * 5 * 6


def test_an_unknown_op_counts_its_results():
    assert cost_of(lambda x: torch.special.i0e(x), R(3, 4)).other_flops == 12


def test_a_custom_op_uses_the_formula_registered_with_torch():
    @torch.library.custom_op("torchlathe_tests::twice_mm", mutates_args=())
    def twice_mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return 2 * (a @ b)

    @twice_mm.register_fake
    def _(a, b):
        return a @ b

    packet = torch.ops.torchlathe_tests.twice_mm
    program = capture(module_of(lambda a, b: packet(a, b)), (R(2, 3), R(3, 4)))
    assert program.cost().flops == 0

    @register_flop_formula(packet)
    def twice_mm_flop(a_shape, b_shape, *args, out_shape=None, **kwargs):
        return 4 * a_shape[0] * a_shape[1] * b_shape[1]

    assert Cost().compute(program).flops == 4 * 2 * 3 * 4


# -- parameters and bytes --------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(4, dtype=torch.float64))
        self.register_buffer("table", torch.ones(3), persistent=False)
        self.register_buffer("unread", torch.ones(7))

    def forward(self, ids):
        literal = torch.tensor([1.0, 2.0, 3.0, 4.0])
        x = self.embed(ids) * self.scale.float() + self.table.sum() + literal
        return self.head(x)


def test_tied_parameters_count_once_and_constants_not_at_all():
    program = capture(Tied(), (torch.tensor([[1, 2]]),))
    cost = program.cost()
    assert cost.parameters == 40
    assert cost.bytes == 4 * 40 + 8 * 4 + 4 * 3 + 4 * 7
    assert any(e.kind is TensorKind.CONSTANT for e in program.entries.values())
    readers = {name: node.parameters for name, node in cost.nodes.items() if node.parameters}
    assert readers == {"embedding": 40, "linear": 40}


def test_a_node_that_reads_one_parameter_twice_counts_it_once():
    class Square(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(R(3, 3))

        def forward(self, x):
            return x + self.w @ self.w

    assert capture(Square(), (R(3, 3),)).cost().nodes["matmul"].parameters == 9


def test_cost_is_cached_until_an_edit():
    program = capture(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), (R(3, 4),))
    before = program.cost()
    assert program.cost() is before
    assert before.flops == 2 * 3 * (4 * 8 + 8 * 2)
    with program.edit() as edit:
        edit.keep("0.weight", {0: torch.arange(5)})
        edit.keep("0.bias", {0: torch.arange(5)})
        edit.keep("2.weight", {1: torch.arange(5)})
    after = program.cost()
    assert after.flops == 2 * 3 * (4 * 5 + 5 * 2)
    assert after.parameters == 4 * 5 + 5 + 5 * 2 + 2
    assert Cost().same(after, Cost().compute(program))
    assert not Cost().same(after, before)


# -- sizes -----------------------------------------------------------------------------------


def test_sizes_of_related_inputs_are_solved_for():
    dim = torch.export.Dim("n", min=3, max=20)
    model = module_of(lambda a, b: (a[1:] * b) @ torch.ones(4, 2))
    program = capture(model, (R(9, 4), R(8, 4)), dynamic_shapes=(({0: dim + 1}, {0: dim}),))
    cost = program.cost()
    assert cost.flops_at() == 2 * 8 * 4 * 2
    assert cost.flops_at({"s0": 5}) == 2 * 5 * 4 * 2


class Nonzero(nn.Module):
    def forward(self, x):
        rows = x[x[:, 0] > 0]
        return rows @ torch.ones(4, 2)


def test_a_size_that_data_decides_has_to_be_given():
    cost = capture(Nonzero(), (R(9, 4),)).cost()
    with pytest.raises(InputError, match="the size u0 is not decided by the shapes of the inputs"):
        cost.flops_at()
    assert cost.flops_at({"u0": 6}) == 2 * 6 * 4 * 2
