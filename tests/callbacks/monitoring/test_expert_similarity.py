"""How alike the experts' outputs are. Shapes: n tokens, D model width, E experts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers.processes import on_two_processes
from torch import Tensor

from evomoe.callbacks import ExpertSimilarity
from evomoe.callbacks.monitoring.expert_similarity import OutputSimilarity, mean_of_pairs, outputs_of_all
from evomoe.models.gpt import GPT
from evomoe.moe import Experts
from evomoe.routing import DTSGate

E, D = 3, 16


class Module:
    """A task whose model has an MoE layer in each of two blocks; records what is logged."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = GPT(50, 8, D, 2, 2, num_experts=E, moe_every=1, router=DTSGate).eval()
        self.logged: dict[str, float] = {}

    @property
    def layers(self):
        return self.model.moe_layers.values()

    def log_dict(self, values, sync_dist) -> None:
        self.logged.update({name: value.item() for name, value in values.items()})


def write_copies(module: Module, *, sign_of_last: int = 1) -> None:
    with torch.no_grad():
        for layer in module.layers:
            for expert in range(1, E):
                for name, parameter in layer.experts.expert_parameters(expert).items():
                    sign = sign_of_last if expert == E - 1 and name in ("w_out", "b_out") else 1
                    parameter.copy_(sign * layer.experts.expert_parameters(0)[name])


def tokens(batch: int = 2, sequence: int = 8, seed: int = 1) -> Tensor:
    return torch.randint(50, (batch, sequence), generator=torch.Generator().manual_seed(seed))


def validate(module: Module, batches: list[Tensor], valid: Tensor | None = None, passes: int = 1) -> dict[str, float]:
    """What one validation logs."""
    callback, trainer = ExpertSimilarity(), SimpleNamespace(sanity_checking=False)
    module.logged = {}
    for index, batch in enumerate(batches):
        callback.on_validation_batch_start(trainer, module, None, index)
        with torch.no_grad():
            for number in range(passes):
                module.model(batch, valid=valid, final_rule=number > 0)
        callback.on_validation_batch_end(trainer, module, None, None, index)
    callback.on_validation_epoch_end(trainer, module)
    return module.logged


def test_copies_have_similarity_one():
    module = Module()
    write_copies(module)
    logged = validate(module, [tokens()])
    assert logged == pytest.approx(
        {f"evolution/{name}expert_similarity": 1.0 for name in ("", "block_0/", "block_1/")}, abs=1e-5
    )


def test_an_expert_that_says_the_opposite():
    module = Module()
    write_copies(module, sign_of_last=-1)
    # Of three pairs one agrees and two disagree.
    assert validate(module, [tokens()])["evolution/expert_similarity"] == pytest.approx(-1 / 3, abs=1e-5)


def test_it_is_the_mean_cosine_of_every_pair_on_every_real_token_of_the_first_batch():
    module, valid = Module(), torch.arange(8).expand(2, 8) < torch.tensor([[8], [5]])
    seen: dict[str, Tensor] = {}
    for name, layer in module.model.moe_layers.items():
        hook = layer.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, args[0]))
        module.model(tokens(), valid=valid)
        hook.remove()
    logged = validate(module, [tokens(), tokens(seed=2)], valid, passes=2)
    means = []
    for name, layer in module.model.moe_layers.items():
        cosines = []
        for row in seen[name][valid]:
            outputs = [layer.experts(row[None], torch.eye(E, dtype=torch.int64)[e])[0] for e in range(E)]
            pairs = [(outputs[i], outputs[j]) for i in range(E) for j in range(i)]
            cosines += [torch.cosine_similarity(a, b, dim=0) for a, b in pairs]
        means.append(torch.stack(cosines).mean().item())
        assert logged[f"evolution/{name}/expert_similarity"] == pytest.approx(means[-1], abs=1e-5)
    assert logged["evolution/expert_similarity"] == pytest.approx(sum(means) / 2, abs=1e-5)


def test_a_layer_with_one_living_expert_has_nothing_to_compare():
    module = Module()
    for layer in module.layers:
        layer.live_experts = 1
    assert validate(module, [tokens()]) == {}


def test_training_state_is_untouched():
    module = Module()
    before = {name: parameter.clone() for name, parameter in module.model.state_dict().items()}
    state = torch.get_rng_state()
    assert validate(module, [tokens()])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in module.model.state_dict().items())
    assert all(parameter.grad is None for parameter in module.model.parameters())
    assert not any(layer._forward_pre_hooks for layer in module.layers)


def test_a_validation_that_fails_leaves_no_hook():
    module, callback = Module(), ExpertSimilarity()
    callback.on_validation_batch_start(SimpleNamespace(sanity_checking=False), module, None, 0)
    assert all(layer._forward_pre_hooks for layer in module.layers)
    callback.on_exception(None, module, KeyboardInterrupt())
    assert not any(layer._forward_pre_hooks for layer in module.layers)


def test_at_most_256_tokens_are_computed(monkeypatch):
    computed = []
    monkeypatch.setattr(Experts, "forward", lambda self, rows, counts: computed.append(counts.tolist()) or rows)
    validate(Module(), [tokens(batch=40)])
    assert computed == [[256] * E] * 2


def test_autocast_does_not_reach_the_outputs():
    experts, hidden = Module().model.moe_layers["block_0"].experts, torch.randn(4, D)
    expected = outputs_of_all(experts, hidden)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(outputs_of_all(experts, hidden), expected)
    assert expected.dtype == torch.float32
    assert not expected.requires_grad


def outputs() -> Tensor:
    return torch.randn(E, 10, D, generator=torch.Generator().manual_seed(0))


def measure_part(rank: int) -> Tensor:
    metric = OutputSimilarity(E)
    metric.update(outputs()[:, :4] if rank == 0 else outputs()[:, 4:])
    return metric.compute()


def test_processes_with_different_numbers_of_tokens_add_up(tmp_path):
    whole = OutputSimilarity(E)
    whole.update(outputs())
    for similarity in on_two_processes(measure_part, tmp_path):
        torch.testing.assert_close(similarity, whole.compute())
    torch.testing.assert_close(whole.compute().diagonal(), torch.ones(E))


def test_mean_of_pairs_typed_by_hand():
    matrix = torch.tensor([[1.0, 0.5, 0.1], [0.5, 1.0, 0.3], [0.1, 0.3, 1.0]])
    assert mean_of_pairs(matrix).item() == pytest.approx(0.3)
