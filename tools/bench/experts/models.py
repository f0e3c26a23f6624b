"""Small mixture-of-experts language models, trained here: on English text, and on skills.

The second has each expert twice: copies share their weights while they are trained, and their
hidden units are put into another order afterwards, so that what should merge is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import nn

from torchlathe.tools.bench.character_model import corpus

__all__ = ["Language", "planted_skills", "text_language"]

CONTEXT: Final = 128
_SKILLS: Final = 8
_SYMBOLS: Final = 24
_SEGMENT: Final = 8  # tokens per skill: its name, a symbol, and what follows from that
_AUXILIARY: Final = 0.02  # weight of the loss that balances the experts, as Mixtral has it


@dataclass(frozen=True)
class Language:
    """A trained model, and data to calibrate and test it with.

    Attributes:
        model: In eval mode; takes ``input_ids``, gives ``logits``.
        calibration: Batches of ``{"input_ids": (batch, tokens)}``.
        test: The same, of data that was not trained on; the same shapes.
        counted: Which targets count in the loss, (tokens - 1,) bool.
        pairs: Expert numbers that are copies of each other, if any.
    """

    model: nn.Module
    calibration: list[dict[str, torch.Tensor]]
    test: list[dict[str, torch.Tensor]]
    counted: torch.Tensor
    pairs: tuple[tuple[int, int], ...] = ()

    def loss(self, run: Callable[..., Any]) -> float:
        """Mean cross entropy in nats over the counted tokens of the test data."""
        total = count = 0.0
        with torch.no_grad():
            for batch in self.test:
                found = _losses(run(**batch).logits, batch["input_ids"], self.counted)
                total, count = total + float(found.sum()), count + found.numel()
        return total / count


def _losses(logits: torch.Tensor, tokens: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Cross entropy of each counted target; one axis."""
    shown = logits[:, :-1][:, counted].flatten(0, 1)
    return F.cross_entropy(shown, tokens[:, 1:][:, counted].flatten(), reduction="none")


# -- English text ----------------------------------------------------------------------------------


def text_language(seed: int, steps: int, cache: Path | None) -> Language:
    """A model of the characters of English text; the last tenth of the text is for testing."""
    seen, unseen, vocabulary = corpus()
    generator = torch.Generator().manual_seed(seed)

    def batches(source: torch.Tensor, size: int, count: int) -> Iterator[torch.Tensor]:
        for _ in range(count):
            starts = torch.randint(len(source) - CONTEXT, (size, 1), generator=generator)
            yield source[starts + torch.arange(CONTEXT)]

    counted = torch.ones(CONTEXT - 1, dtype=torch.bool)
    model = _mixtral(seed, vocabulary, hidden=64, inner=128, layers=2)
    _train(model, batches(seen, 16, steps), steps, counted, _file(cache, "text", seed, steps))
    generator.manual_seed(1000 + seed)
    calibration = [{"input_ids": x} for x in batches(seen, 16, 16)]
    test = [{"input_ids": x} for x in batches(unseen, 16, 24)]
    return Language(model.eval(), calibration, test, counted)


# -- skills with planted copies --------------------------------------------------------------------


class _Copies(nn.Module):
    """A tensor of experts that is twice the same half."""

    def forward(self, half: torch.Tensor) -> torch.Tensor:
        return torch.cat([half, half])

    def right_inverse(self, whole: torch.Tensor) -> torch.Tensor:
        return whole[: len(whole) // 2].clone()


def planted_skills(seed: int, steps: int, cache: Path | None) -> Language:
    """A model that knows eight permutations of symbols, with four experts that it has twice.

    Its rows of the router begin as pairs that differ by noise, and are trained apart from each
    other; the hidden units of the second copies are shuffled at the end.
    """
    generator = torch.Generator().manual_seed(seed)
    maps = torch.stack([torch.randperm(_SYMBOLS, generator=generator) for _ in range(_SKILLS)])

    def batches(size: int, count: int) -> Iterator[torch.Tensor]:
        for _ in range(count):
            skill = torch.randint(_SKILLS, (size, CONTEXT // _SEGMENT), generator=generator)
            symbol = torch.randint(_SYMBOLS, skill.shape, generator=generator)
            tokens = [_SYMBOLS + skill, symbol]
            for _ in range(_SEGMENT - 2):
                tokens.append(maps[skill, tokens[-1]])
            yield torch.stack(tokens, dim=-1).flatten(1)

    place = torch.arange(1, CONTEXT) % _SEGMENT
    model = _mixtral(seed, _SYMBOLS + _SKILLS, hidden=48, inner=96, layers=2)
    experts = [layer.mlp.experts for layer in model.model.layers]
    for layer in model.model.layers:
        rows = layer.mlp.gate.weight
        with torch.no_grad():
            rows[4:] = rows[:4] + 0.3 * rows[:4].std() * torch.randn(rows[4:].shape)
        for name in ("gate_up_proj", "down_proj"):
            nn.utils.parametrize.register_parametrization(layer.mlp.experts, name, _Copies())
    file = _file(cache, "skills", seed, steps)
    _train(model, batches(16, steps), steps, place >= 2, file)
    for each in experts:
        for name in ("gate_up_proj", "down_proj"):
            nn.utils.parametrize.remove_parametrizations(each, name)
        _shuffle(each, generator)
    calibration = [{"input_ids": x} for x in batches(16, 16)]
    test = [{"input_ids": x} for x in batches(16, 16)]
    pairs = tuple((i, i + 4) for i in range(4))
    return Language(model.eval(), calibration, test, place >= 2, pairs)


def _shuffle(experts: Any, generator: torch.Generator) -> None:
    """Put the hidden units of the second copies into another order, each its own."""
    units = experts.down_proj.shape[-1]
    with torch.no_grad():
        for number in range(4, 8):
            order = torch.randperm(units, generator=generator)
            rows = torch.cat([order, order + units])
            experts.gate_up_proj[number] = experts.gate_up_proj[number][rows]
            experts.down_proj[number] = experts.down_proj[number][:, order]


# -- training --------------------------------------------------------------------------------------


def _mixtral(seed: int, vocabulary: int, *, hidden: int, inner: int, layers: int) -> Any:
    from torchlathe.tools.compat import define_torchvision_ops

    define_torchvision_ops()
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=8,
            num_experts_per_tok=2,
            max_position_embeddings=CONTEXT,
            router_aux_loss_coef=_AUXILIARY,
            use_cache=False,
        )
    )


def _file(cache: Path | None, name: str, seed: int, steps: int) -> Path | None:
    return None if cache is None else cache / f"{name}-{seed}-{steps}.pt"


def _train(
    model: Any,
    batches: Iterator[torch.Tensor],
    steps: int,
    counted: torch.Tensor,
    file: Path | None,
) -> None:
    """AdamW with a cosine schedule; the auxiliary loss that balances experts is the model's own."""
    if file is not None and file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
        return
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min(1, (n + 1) / 30) * (0.5 + 0.5 * math.cos(math.pi * n / steps))
    )
    for tokens in batches:
        out = model(input_ids=tokens, output_router_logits=True)
        # Without labels the model tells the auxiliary loss by itself.
        loss = _losses(out.logits, tokens, counted).mean() + _AUXILIARY * out.aux_loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.zero_grad()
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), file)
