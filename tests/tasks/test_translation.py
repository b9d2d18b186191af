from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from data.tiny_pairs import data_module, ready
from sacrebleu import corpus_bleu, corpus_chrf

from evomoe.errors import ConfigError
from evomoe.models.beam_search import beam_search
from evomoe.models.transformer import Transformer
from evomoe.routing import DTSGate, ExpertChoice, ScheduleValues, Switch
from evomoe.tasks import Optimization, Translation

DROPLESS = partial(Switch, capacity_factor=None)


def make_task(router: Any = DROPLESS, **options: Any) -> Translation:
    torch.manual_seed(0)
    model = Transformer(300, 64, 32, 2, 2, num_experts=3, router=router, dropout=0.0)
    optimization = Optimization(learning_rate=5e-3, weight_decay=0.0)
    return Translation(model, optimization, **{"beam": 2, "val_sentences": 3, **options})


def make_trainer(**options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(enable_checkpointing=False, check_val_every_n_epoch=None, **quiet, **options)


def loss_by_hand(task: Translation, folder: Path, final_rule: bool = False) -> float:
    """Mean over the targets of the test, one sentence at a time and without padding."""
    data = ready(folder)
    end = data.tokenizer.end_of_text_id
    losses: list[float] = []
    task.eval()
    for index in range(5):
        source, target = (side.tolist() for side in data.store.pairs("test")[index])
        with torch.no_grad():
            logits, _ = task.model(
                torch.tensor([[*source, end]]), torch.tensor([[end, *target]]), final_rule=final_rule
            )
        shares = logits[0].log_softmax(dim=-1)
        losses += [-float(shares[place, token]) for place, token in enumerate([*target, end])]
    return sum(losses) / len(losses)


def test_evaluation_is_the_mean_over_the_target_tokens_under_both_rules(tmp_path: Path) -> None:
    task, trainer = make_task(DTSGate), make_trainer()
    for layer in task.model.moe_layers.values():
        torch.nn.init.normal_(layer.router.gate.weight)
        layer.router.set_schedule(ScheduleValues(temperature=2.0))
    trainer.test(task, datamodule=data_module(tmp_path), verbose=False)
    values = {name: float(value) for name, value in trainer.callback_metrics.items()}
    dense, sparse = (loss_by_hand(task, tmp_path, final_rule) for final_rule in (False, True))
    assert values["test/loss"] == pytest.approx(dense, rel=1e-5)
    assert values["test/perplexity"] == pytest.approx(math.exp(dense), rel=1e-5)
    assert values["test/loss_sparse"] == pytest.approx(sparse, rel=1e-5)
    assert dense != pytest.approx(sparse, rel=1e-5)


def test_the_test_translates_everything_by_beam_search(tmp_path: Path) -> None:
    task, trainer, data = make_task(), make_trainer(), data_module(tmp_path)
    trainer.test(task, datamodule=data, verbose=False)
    end = data.tokenizer.end_of_text_id
    hypotheses, references = [], []
    for index in range(5):
        source, target = data.texts("test", index)
        (best,) = beam_search(task.model, [[*data.tokenizer.encode(source), end]], begin_id=end, end_id=end, beam=2)
        hypotheses.append(data.tokenizer.decode(best[0].tokens))
        references.append(target)
    assert [found.hypothesis for found in task.scores.gather()] == hypotheses
    values = trainer.callback_metrics
    assert float(values["test/bleu"]) == pytest.approx(corpus_bleu(hypotheses, [references]).score)
    assert float(values["test/chrf"]) == pytest.approx(corpus_chrf(hypotheses, [references]).score)
    assert float(values["test/exact_match"]) == 0


def be_sure(task: Translation) -> None:
    """Weights with which a model, though untrained, is sure enough of its words for beams and rules to differ."""
    with torch.no_grad():
        for parameter in task.model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.4)


def translate(task: Translation, data: Any, split: str, index: int, **options: Any) -> str:
    """One sentence alone."""
    end = data.tokenizer.end_of_text_id
    source = data.tokenizer.encode(data.texts(split, index)[0])
    ((best, *_),) = beam_search(task.model, [[*source, end]], begin_id=end, end_id=end, **options)
    return data.tokenizer.decode(best.tokens)


@pytest.mark.parametrize("split", ["val", "test"])
def test_translations_are_scored_under_both_rules(tmp_path: Path, split: str) -> None:
    task, trainer, data = make_task(DTSGate, val_sentences=9, max_length_offset=8), make_trainer(), ready(tmp_path)
    be_sure(task)
    for layer in task.model.moe_layers.values():
        layer.router.set_schedule(ScheduleValues(temperature=5.0))
    run = trainer.test if split == "test" else trainer.validate
    run(task, datamodule=data, verbose=False)
    beam = 2 if split == "test" else 1
    found = task.scores.gather()
    for sentence in found:
        usual, final = (
            translate(task, data, split, sentence.index, beam=beam, max_length=8, final_rule=rule)
            for rule in (False, True)
        )
        assert (sentence.hypothesis, sentence.sparse_hypothesis) == (usual, final)
    assert any(sentence.hypothesis != sentence.sparse_hypothesis for sentence in found)
    values, references = trainer.callback_metrics, [[sentence.reference for sentence in found]]
    for name, key in (("chrf", "hypothesis"), ("chrf_sparse", "sparse_hypothesis")):
        score = corpus_chrf([getattr(sentence, key) for sentence in found], references).score
        assert float(values[f"{split}/{name}"]) == pytest.approx(score)


@pytest.mark.parametrize(("hardened", "searches"), [(False, 2), (True, 1)])
def test_a_hardened_gate_is_searched_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hardened: bool, searches: int
) -> None:
    task, trainer, rules = make_task(DTSGate), make_trainer(limit_test_batches=1), []

    def search(*args: Any, final_rule: bool, **options: Any) -> Any:
        rules.append(final_rule)
        return beam_search(*args, final_rule=final_rule, **options)

    monkeypatch.setattr("evomoe.tasks.translation.beam_search", search)
    for layer in task.model.moe_layers.values():
        layer.router.set_schedule(ScheduleValues(hardened=hardened))
    trainer.test(task, datamodule=data_module(tmp_path), verbose=False)
    assert rules == [False, True][:searches]
    assert {"test/bleu", "test/bleu_sparse"} <= trainer.callback_metrics.keys()


def test_a_validation_searches_as_wide_as_it_is_told_and_no_translation_is_longer_than_it_may_be(
    tmp_path: Path,
) -> None:
    data = ready(tmp_path)
    task = make_task(val_sentences=9, val_beam=3, length_penalty=0.2, max_length_ratio=0.25, max_length_offset=1)
    be_sure(task)
    make_trainer().validate(task, datamodule=data, verbose=False)
    options = {"length_penalty": 0.2, "max_length": task.max_length}
    found = {sentence.index: sentence.hypothesis for sentence in task.translations}
    assert found == {index: translate(task, data, "val", index, beam=3, **options) for index in found}
    assert found != {index: translate(task, data, "val", index, beam=1, **options) for index in found}
    unlimited = {"beam": 3, "length_penalty": 0.2}
    assert any(text != translate(task, data, "val", index, **unlimited) for index, text in found.items())


def test_a_validation_translates_the_same_sample_of_the_split_however_few_batches_it_has(tmp_path: Path) -> None:
    data = ready(tmp_path, eval_batch_tokens=32)
    expected = torch.randperm(9, generator=torch.Generator().manual_seed(0))[:4].tolist()
    for _ in range(2):
        task, trainer = make_task(val_sentences=4), make_trainer(limit_val_batches=1)
        trainer.validate(task, datamodule=data, verbose=False)
        found = [sentence.index for sentence in task.translations]
        assert sorted(found) == sorted(expected)
        assert all(sentence.source == data.texts("val", sentence.index)[0] for sentence in task.translations)


def test_callbacks_hear_the_batch_before_the_sample_is_translated(tmp_path: Path) -> None:
    task, heard = make_task(), []
    layer = task.model.moe_layers["decoder_1"]
    layer.register_forward_pre_hook(lambda _, inputs: heard.append(tuple(inputs[0].shape[:2])))
    data = data_module(tmp_path, eval_batch_tokens=64)
    make_trainer(limit_val_batches=1).validate(task, datamodule=data, verbose=False)
    assert task.translations
    assert heard[0] == tuple(next(iter(data.val_dataloader()))["valid"].shape)


def test_a_validation_translates_as_many_sentences_as_it_is_asked_for(tmp_path: Path) -> None:
    data = data_module(tmp_path, eval_batch_tokens=64)
    for count, expected in ((3, 3), (0, 0), (100, 9)):
        task, trainer = make_task(val_sentences=count), make_trainer()
        trainer.validate(task, datamodule=data, verbose=False)
        assert len(task.translations) == expected
        assert ("val/bleu" in trainer.callback_metrics) == (count > 0)


def test_training_learns_to_translate(tmp_path: Path) -> None:
    task, data = make_task(val_sentences=10, label_smoothing=0.0), data_module(tmp_path, pairs=10)
    # The training sentences, to be known by heart.
    data.val_dataloader = lambda: data._evaluation_loader("train")
    data.sample = lambda split, count: type(data).sample(data, "train", count)
    data.texts = lambda split, index: type(data).texts(data, "train", index)
    trainer = make_trainer(max_steps=300)
    trainer.fit(task, datamodule=data)
    values = trainer.validate(task, datamodule=data, verbose=False)[0]
    assert values["val/loss"] < 0.1
    assert values["val/exact_match"] > 0.8
    assert values["val/bleu"] > 80


def test_smoothed_labels_are_for_the_training_alone(tmp_path: Path) -> None:
    task = make_task(label_smoothing=0.3).eval()  # without the router's jitter
    task.log = lambda *args, **kwargs: None
    batch = next(iter(ready(tmp_path).train_dataloader()))
    outputs = task.training_step(batch, 0)
    logits, _ = task.model(
        batch["source"], batch["target"][:, :-1], source_valid=batch["source_valid"], valid=batch["valid"]
    )
    shares = logits[batch["valid"]].log_softmax(dim=-1)  # (n, V)
    targets = batch["target"][:, 1:][batch["valid"]]
    plain = -shares.gather(1, targets[:, None]).mean()
    smoothed = (0.7 * plain - 0.3 * shares.mean(dim=-1).mean()).detach()
    assert float(outputs["task_loss"]) == pytest.approx(float(smoothed), rel=1e-5)
    total, _ = task._cross_entropy(batch)
    assert float(total.detach() / len(targets)) == pytest.approx(float(plain.detach()), rel=1e-5)
    torch.testing.assert_close(F.cross_entropy(logits[batch["valid"]], targets), plain)


def test_work_is_charged_for_both_stacks(tmp_path: Path) -> None:
    task = make_task()
    task.log = lambda *args, **kwargs: None
    batch = next(iter(ready(tmp_path).train_dataloader()))
    work = task.training_step(batch, 0)["work"]
    (sequences, source), target = batch["source"].shape, batch["valid"].shape[1]
    assert int(work.tokens) == int(batch["valid"].sum())
    shares = [float(batch[name].float().mean()) for name in ("source_valid", "valid")]  # padding goes to no expert
    assert work.forward_flops == pytest.approx(task.model.forward_flops(sequences, source, target, shares))


def test_a_batch_of_padding_changes_nothing(tmp_path: Path) -> None:
    task, data = make_task(), ready(tmp_path)
    batches = list(data.test_dataloader())
    filler = data._batches("test")[[-1]]
    losses = []
    for given in (batches, [*batches, filler]):
        data.test_dataloader = lambda given=given: torch.utils.data.DataLoader(given, batch_size=None)
        trainer = make_trainer()
        trainer.test(task, datamodule=data, verbose=False)
        losses.append({name: float(value) for name, value in trainer.callback_metrics.items()})
    assert losses[0] == losses[1]


def test_the_encoder_may_use_any_router_and_the_decoder_may_not(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"router ExpertChoice looks at later tokens in .* set model.allow_future_leak"
    ):
        make_task(ExpertChoice)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"label_smoothing": 1.0}, r"task.label_smoothing=1.0: expected a share in \[0, 1\)"),
        ({"beam": 0}, "task.beam=0: expected at least 1"),
        ({"val_sentences": -1}, "task.val_sentences=-1: expected at least 0"),
        ({"val_beam": 0}, "task.val_beam=0: expected at least 1"),
        ({"max_length_ratio": -1.0}, "max_length_ratio=-1.0: expected a number of 0 or above, or null"),
        ({"bleu_tokenizer": "words"}, "task.bleu_tokenizer=words is unknown to sacrebleu; choose one of 13a, char"),
    ],
)
def test_bad_options_are_refused(option: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_task(**option)
