from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from evomoe.callbacks import TextSamples
from evomoe.data.tokenizer import Tokenizer
from evomoe.errors import ConfigError
from evomoe.models.generation import generate
from evomoe.models.gpt import GPT
from evomoe.models.roberta import RoBERTa
from evomoe.routing import DTSGate


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the quick brown fox\njumps over the lazy dog"], 300)


@pytest.fixture
def module(tokenizer) -> SimpleNamespace:
    torch.manual_seed(0)
    return SimpleNamespace(model=GPT(tokenizer.vocab_size, 16, 16, 2, 2, num_experts=3, router=DTSGate))


def written(tmp_path, tokenizer, module, callback, logger=TensorBoardLogger, **state) -> list[tuple]:
    """What the callback writes to TensorBoard after a validation at step 7."""
    calls: list[tuple] = []
    logger = logger(tmp_path)
    logger._experiment = SimpleNamespace(add_text=lambda *arguments: calls.append(arguments))
    state = {"global_step": 7, "sanity_checking": False, "is_global_zero": True, **state}
    trainer = SimpleNamespace(
        loggers=[CSVLogger(tmp_path), logger], datamodule=SimpleNamespace(tokenizer=tokenizer), **state
    )
    callback.on_validation_end(trainer, module)
    return calls


def test_greedy_continuations_are_written_as_typed(tmp_path, tokenizer, module):
    prompts = ["the fox", "over\nthe"]
    ((name, text, step),) = written(tmp_path, tokenizer, module, TextSamples(prompts, max_new_tokens=5))
    assert (name, step) == ("samples", 7)
    expected = [
        tokenizer.decode(sample.prompt + sample.continuation)
        for sample in generate(module.model, [tokenizer.encode(prompt) for prompt in prompts], 5, temperature=0.0)
    ]
    first, second = text.split("\n\n---\n\n")
    assert first == "    " + expected[0].replace("\n", "\n    ")
    assert second.startswith("    over\n    the")


def test_a_model_that_does_not_write_on_is_refused():
    module = SimpleNamespace(model=RoBERTa(9, 8, 16, 2, 2, router=DTSGate))
    with pytest.raises(ConfigError, match="^callbacks.samples continues prompts, which RoBERTa cannot: set"):
        TextSamples(["a"]).setup(SimpleNamespace(), module, "fit")


def test_training_goes_on_as_if_nothing_had_been_written(tmp_path, tokenizer, module):
    module.model.train()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert written(tmp_path, tokenizer, module, TextSamples(["the fox"]))
    assert torch.equal(torch.get_rng_state(), before)
    assert module.model.training


@pytest.mark.parametrize(
    "state",
    [{"logger": CSVLogger}, {"sanity_checking": True}, {"is_global_zero": False}],
    ids=lambda state: next(iter(state)),
)
def test_nothing_is_generated_where_nobody_would_see_it(tmp_path, tokenizer, module, state):
    module.model = None
    assert written(tmp_path, tokenizer, module, TextSamples(["the fox"]), **state) == []
