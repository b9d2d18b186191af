"""The chunked cross-entropy against the definition over whole logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from evomoe.models import cross_entropy
from evomoe.models.cross_entropy import linear_cross_entropy
from evomoe.models.gpt import GPT

WIDTH, VOCABULARY, ROWS = 5, 11, 16


def sample(tokens: int, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = scale * torch.randn(tokens, WIDTH, generator=generator)
    weight = torch.randn(ROWS, WIDTH, generator=generator)
    targets = torch.randint(0, VOCABULARY, (tokens,), generator=generator)
    targets[::4] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.t())[:, :VOCABULARY].float(), targets, reduction="sum")


@pytest.mark.parametrize("chunk", [1, 3, 7, 1024])
def test_loss_and_gradients_are_those_of_the_definition(monkeypatch, chunk):
    monkeypatch.setattr(cross_entropy, "CHUNK", chunk)
    hidden, weight, targets = sample(13)
    expected = reference(hidden, weight, targets)
    loss = linear_cross_entropy(hidden, weight, targets, VOCABULARY)
    torch.testing.assert_close(loss, expected)
    wanted = torch.autograd.grad(0.3 * expected, (hidden, weight))
    got = torch.autograd.grad(0.3 * loss, (hidden, weight))
    torch.testing.assert_close(got, wanted)
    assert torch.equal(got[1][VOCABULARY:], torch.zeros(ROWS - VOCABULARY, WIDTH))  # nobody's rows learn nothing


def test_uniform_scores_typed_by_hand():
    hidden, weight = torch.zeros(3, WIDTH, requires_grad=True), torch.ones(ROWS, WIDTH)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([0, -100, 10]), VOCABULARY)
    assert loss.item() == pytest.approx(2 * 2.397895)  # ln 11 for each of the two tokens that have a target


def test_scores_that_underflow_a_probability_cost_what_they_should():
    hidden, weight, targets = sample(9, scale=200.0)
    loss = linear_cross_entropy(hidden, weight, targets, VOCABULARY)
    assert loss > 500
    torch.testing.assert_close(loss, reference(hidden, weight, targets))


def test_tokens_without_a_target_change_nothing():
    hidden, weight, targets = sample(13)
    real = targets >= 0
    loss = linear_cross_entropy(hidden, weight, targets, VOCABULARY)
    torch.testing.assert_close(loss, linear_cross_entropy(hidden[real], weight, targets[real], VOCABULARY))
    (d_hidden,) = torch.autograd.grad(loss, hidden)
    assert (d_hidden[~real] == 0).all()
    assert (d_hidden[real] != 0).all()


def test_a_batch_of_padding_costs_nothing():
    hidden, weight, _ = sample(4)
    loss = linear_cross_entropy(hidden, weight, torch.full((4,), -100), VOCABULARY)
    assert loss.item() == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, (hidden, weight)))


def test_a_token_that_is_not_finite_makes_the_loss_so():
    hidden, weight, targets = sample(6)
    poisoned = hidden.detach().clone()
    poisoned[1] = torch.nan
    assert linear_cross_entropy(poisoned, weight, targets, VOCABULARY).isnan()


def test_autocast_takes_products_in_bfloat16_and_the_softmax_in_fp32():
    hidden, weight, targets = sample(13)
    with torch.autocast("cpu", torch.bfloat16):
        expected = reference(hidden, weight, targets)
        loss = linear_cross_entropy(hidden, weight, targets, VOCABULARY)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    got, wanted = (torch.autograd.grad(value, (hidden, weight)) for value in (loss, expected))
    assert [gradient.dtype for gradient in got] == [torch.float32] * 2
    torch.testing.assert_close(got, wanted, rtol=0.02, atol=0.02)


def test_the_model_measures_what_its_logits_say():
    torch.manual_seed(0)
    model = GPT(VOCABULARY, 6, 8, 1, 2, moe_every=0, dropout=0.0)
    tokens, targets = torch.randint(0, VOCABULARY, (2, 3, 6))
    targets[1, 2:] = -100
    loss, _ = model(tokens, targets=targets)
    logits, _ = model(tokens)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
    with torch.no_grad():
        assert model(tokens, targets=targets)[0] == loss
