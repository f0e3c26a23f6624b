"""Small mixture-of-experts models for tests: of transformers, and one written out."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

from torchlathe.ir import Program, capture
from torchlathe.tools.stacked_experts import stack_switch_experts

VOCABULARY = 64
Batch = dict[str, torch.Tensor]


class TopK(nn.Module):
    """Gated experts behind a linear router, and a head that makes their outputs matter."""

    def __init__(self, experts: int = 4, top_k: int = 2, inputs: int = 6, hidden: int = 5) -> None:
        super().__init__()
        self.top_k = top_k
        self.router = nn.Linear(inputs, experts)
        self.up = nn.Parameter(torch.randn(experts, 2 * hidden, inputs))
        self.up_bias = nn.Parameter(torch.randn(experts, 2 * hidden))
        self.down = nn.Parameter(torch.randn(experts, inputs, hidden))

    def forward(self, x: torch.Tensor) -> Any:
        return self.mixed(x, self.router(x))

    def mixed(self, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """What the experts give that the logits choose."""
        gates, chosen = logits.softmax(-1).topk(self.top_k, dim=-1)
        numbers, rows = chosen.flatten(), x.repeat_interleave(self.top_k, 0)
        up = torch.bmm(self.up[numbers], rows.unsqueeze(-1)).squeeze(-1) + self.up_bias[numbers]
        gate, value = up.chunk(2, dim=-1)
        out = torch.bmm(self.down[numbers], (nn.functional.silu(gate) * value).unsqueeze(-1))
        out = out.squeeze(-1) * gates.flatten().unsqueeze(-1)
        return out.view(x.shape[0], self.top_k, -1).sum(1)

    def written_out(self, x: torch.Tensor, allowed: list[int] | None = None) -> torch.Tensor:
        """The same, row by row and expert by expert, with some experts forbidden."""
        experts = range(len(self.up)) if allowed is None else allowed
        results = []
        for row in x:
            out = torch.zeros_like(row)
            logits = self.router(row)
            probabilities = logits[list(experts)].softmax(-1)
            gates, places = probabilities.sort(descending=True)
            for gate, place in list(zip(gates, places, strict=True))[: self.top_k]:
                e = list(experts)[int(place)]
                a, b = (self.up[e] @ row + self.up_bias[e]).chunk(2)
                out = out + gate * (self.down[e] @ (nn.functional.silu(a) * b))
            results.append(out)
        return torch.stack(results)


def _lively(model: nn.Module) -> nn.Module:
    """Larger experts and routers, so that who is chosen matters to the outputs."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name or ".mlp.up" in name or ".mlp.down" in name:
                parameter.mul_(5)
            elif parameter.dim() == 2 and any(x in name for x in ("mlp.gate", "classifier")):
                parameter.mul_(20)
    return model.eval()


def mixtral(experts: str = "grouped_mm", **options: Any) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    given = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24, **options}
    model = MixtralForCausalLM(MixtralConfig(**_common(), **given))
    model.set_experts_implementation(experts)
    return _lively(model)


def qwen3_moe(experts: str = "grouped_mm", **options: Any) -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    given = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, **options}
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**_common(), head_dim=8, intermediate_size=24, **given)
    )
    model.set_experts_implementation(experts)
    return _lively(model)


def _common() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
        "use_cache": False,
    }


def switch(stacked: bool = True, **options: Any) -> nn.Module:
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    given = {"num_experts": 4, "num_layers": 2, "num_decoder_layers": 2, **options}
    config = SwitchTransformersConfig(
        vocab_size=VOCABULARY,
        d_model=16,
        d_ff=24,
        d_kv=8,
        num_heads=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        use_cache=False,
        **given,
    )
    model = SwitchTransformersForConditionalGeneration(config).eval()
    return _lively(stack_switch_experts(model)) if stacked else _lively(model)


def batch_for(model: nn.Module, seed: int = 0) -> Batch:
    """Token numbers, with what an encoder and a decoder need."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (2, 8), generator=generator)
    batch = {"input_ids": tokens}
    if "Switch" in type(model).__name__:
        ones = torch.ones_like(tokens)
        batch |= {"decoder_input_ids": tokens.flip(1)}
        batch |= {"attention_mask": ones, "decoder_attention_mask": ones}
    return batch


MODELS = {
    "mixtral": mixtral,
    "mixtral-batched": lambda: mixtral("batched_mm"),
    "qwen3": qwen3_moe,
    "switch": switch,
}

# One that reads experts by groups and one by an index; the others where there is time.
EACH = [
    "mixtral",
    "switch",
    pytest.param("mixtral-batched", marks=pytest.mark.slow),
    pytest.param("qwen3", marks=pytest.mark.slow),
]


@functools.cache
def made(name: str) -> tuple[nn.Module, Program, list[Batch]]:
    """A model, its program, and batches to calibrate with; tests share them."""
    torch.manual_seed(0)
    model = MODELS[name]()
    batches = [batch_for(model, seed) for seed in range(3)]
    return model, capture(model, (), batches[0]), batches
