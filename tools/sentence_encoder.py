"""The parts of the demo that know about language: pooling, tokens and sentences."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

__all__ = ["SentenceEncoder", "documentation_sentences", "make_tokenizer"]

_MOST_TOKENS = 256  # what the encoder was trained with
_SENTENCE_END = re.compile(r"(?<=[a-z\)\"][.!?])\s+(?=[A-Z\"])")


class SentenceEncoder(nn.Module):
    """Token ids to one unit vector per sentence: a BERT, the mean over its tokens, normalised.

    Shapes:
        input_ids, attention_mask: (sentences, tokens) int64.
        result: (sentences, width).
    """

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Embed sentences."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        return nn.functional.normalize(mean, dim=1)


def make_tokenizer(tokenizer: Any) -> Callable[[Sequence[str]], dict[str, torch.Tensor]]:
    """A function from sentences to the encoder's keyword arguments."""

    def tokens(sentences: Sequence[str]) -> dict[str, torch.Tensor]:
        found = tokenizer(
            list(sentences),
            padding=True,
            truncation=True,
            max_length=_MOST_TOKENS,
            return_tensors="pt",
        )
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    return tokens


def documentation_sentences() -> list[str]:
    """The English sentences of Python's documentation, each once, in a fixed order."""
    from pydoc_data.topics import topics

    found: dict[str, None] = {}
    for _, text in sorted(topics.items()):
        for paragraph in re.split(r"\n\s*\n", text):
            lines = paragraph.splitlines()
            # Code and grammar are indented; headings are underlined.
            if not lines or any(re.match(r"\s|[*=\-^~]", line) for line in lines):
                continue
            for sentence in _SENTENCE_END.split(_joined(lines)):
                if _is_prose(sentence):
                    found[sentence] = None
    return list(found)


def _joined(lines: Sequence[str]) -> str:
    """Lines as one; a word that was broken at its hyphen is whole again."""
    return re.sub(r"(?<=\w-)\n", "", "\n".join(lines)).replace("\n", " ")


def _is_prose(sentence: str) -> bool:
    words = sentence.split()
    letters = sum(char.isalpha() or char.isspace() for char in sentence)
    return (
        7 <= len(words) <= 40
        and letters > 0.9 * len(sentence)
        and sentence[0].isupper()
        and sentence.endswith((".", "!", "?"))
    )
