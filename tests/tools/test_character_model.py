import math

import pytest
import torch

from torchlathe.tools.bench import character_model
from torchlathe.tools.bench.character_model import CONTEXT, batches, corpus, losses, perplexity


def test_corpus_is_in_two_parts_of_the_same_characters():
    seen, unseen, vocabulary = corpus()
    assert len(seen) > 8 * len(unseen) > CONTEXT
    assert int(seen.max()) < vocabulary
    assert int(unseen.max()) < vocabulary


def test_batches_are_excerpts_and_the_same_again():
    first, again = list(batches(3, 4, seed=5)), list(batches(3, 4, seed=5))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    text = corpus()[0]
    row = first[1][2]
    places = (text == row[0]).nonzero().flatten()
    assert any(torch.equal(text[p : p + CONTEXT], row) for p in places)


def test_perplexity_of_knowing_nothing_is_the_number_of_characters():
    vocabulary = corpus()[2]
    found = perplexity(lambda tokens: torch.zeros(*tokens.shape, vocabulary), list(batches(2, 2)))
    assert found == pytest.approx(vocabulary, rel=1e-5)  # fp32 logarithms


def test_losses_are_those_of_the_next_character():
    tokens = torch.tensor([[1, 2, 3]])
    logits = torch.zeros(1, 3, 4)
    logits[0, 0, 2] = logits[0, 1, 3] = 100.0
    assert float(losses(logits, tokens).max()) == 0.0
    assert float(losses(-logits, tokens).min()) > 100.0 - math.log(4)


def test_trained_weights_are_found_again(tmp_path):
    told = []
    model = character_model.trained(steps=2, cache=tmp_path, progress=told.append)
    again = character_model.trained(steps=2, cache=tmp_path, progress=told.append)
    assert len(told) == 2  # of the first alone
    assert len(list(tmp_path.iterdir())) == 1
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
