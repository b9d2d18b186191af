"""Both kernels against a dense oracle, values and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from evomoe.errors import ConfigError
from evomoe.moe.experts import Experts
from evomoe.routing.contract import SparseRouting

BACKENDS = ["loop", "grouped_mm"]
ACTIVATIONS = ["gelu", "relu", "swiglu"]
D, H = 16, 24

# Rows: tokens; columns: experts; zero means "not chosen".
CASES = {
    "two experts per token": torch.tensor([[0.5, 0.5, 0, 0], [0, 0.9, 0.2, 0], [0.3, 0, 0, 0.7], [0, 0, 1.5, -0.5]]),
    "a token without expert": torch.tensor([[0.0, 0, 0], [0.4, 0, 0.6], [0, 1, 0]]),
    "an expert without token": torch.tensor([[0.0, 0.4, 0], [0, 0.9, 0.2]]),
    "one expert has all": torch.tensor([[0.0, 0.4, 0], [0, 0.9, 0], [0, 1, 0], [0, 1, 0]]),
    "every expert for every token": torch.tensor([[0.1, 0.4, 0.5], [0.2, 0.9, -0.1], [1, 1, 1]]),
    "one expert": torch.tensor([[0.3], [1.0], [2.0]]),
    "no assignment": torch.zeros(3, 4),
    "no token": torch.zeros(0, 4),
}


def sparse(dense: Tensor) -> SparseRouting:
    """The routing whose combine weights are ``dense (T, E)``; its weights are a leaf that wants a gradient."""
    expert, token = dense.t().nonzero(as_tuple=True)
    return SparseRouting(
        token=token,
        weight=dense[token, expert].clone().requires_grad_(),
        tokens_per_expert=torch.bincount(expert, minlength=dense.shape[1]),
        scores=dense,
        num_tokens=torch.tensor(dense.shape[0]),
        dropped=torch.tensor(0),
    )


def make(num_experts: int, backend: str, activation: str = "gelu", bias: bool = True, seed: int = 0) -> Experts:
    torch.manual_seed(seed)
    experts = Experts(num_experts, D, H, activation=activation, bias=bias, backend=backend, init_std=0.3)
    for name, parameter in experts.named_parameters():
        if name.startswith("b_"):
            nn.init.normal_(parameter)
    return experts


def oracle(experts: Experts, hidden: Tensor, dense: Tensor, activation: str) -> Tensor:
    """Every expert for every token, weighted by ``dense (T, E)``."""
    w_in, w_out = torch.stack(list(experts.w_in)), torch.stack(list(experts.w_out))
    pre = torch.einsum("td,efd->tef", hidden, w_in)
    if experts.b_in is not None:
        pre = pre + torch.stack(list(experts.b_in))
    if activation == "swiglu":
        act = F.silu(pre[..., : pre.shape[-1] // 2]) * pre[..., pre.shape[-1] // 2 :]
    else:
        act = {"gelu": F.gelu, "relu": F.relu}[activation](pre)
    outputs = torch.einsum("teh,edh->ted", act, w_out)
    if experts.b_out is not None:
        outputs = outputs + torch.stack(list(experts.b_out))
    return torch.einsum("ted,te->td", outputs, dense)


def gradients(experts: Experts) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in experts.named_parameters()}  # type: ignore[misc]


def assert_equals_oracle(dense: Tensor, backend: str, activation: str, bias: bool) -> None:
    experts = make(dense.shape[1], backend, activation, bias)
    reference = copy.deepcopy(experts)
    hidden = torch.randn(dense.shape[0], D, requires_grad=True)
    hidden_reference = hidden.detach().clone().requires_grad_()
    d_out = torch.randn(dense.shape[0], D)

    routing = sparse(dense)
    out = experts.mix(hidden, routing)
    out.backward(d_out)
    dense_reference = dense.clone().requires_grad_()
    expected = oracle(reference, hidden_reference, dense_reference, activation)
    expected.backward(d_out)

    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(hidden.grad, hidden_reference.grad, atol=1e-5, rtol=1e-4)
    d_weight = dense_reference.grad[routing.token, routing.expert]
    torch.testing.assert_close(routing.weight.grad, d_weight, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(gradients(experts), gradients(reference), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_mix_equals_oracle(case: str, bias: bool, activation: str, backend: str) -> None:
    assert_equals_oracle(CASES[case], backend, activation, bias)


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 12),
    num_experts=st.integers(1, 6),
    share=st.floats(0, 1),
    backend=st.sampled_from(BACKENDS),
    activation=st.sampled_from(ACTIVATIONS),
    seed=st.integers(0, 2**16),
)
def test_mix_equals_oracle_for_any_routing(
    tokens: int, num_experts: int, share: float, backend: str, activation: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(tokens, num_experts, generator=generator) < share
    assert_equals_oracle(torch.randn(tokens, num_experts, generator=generator) * chosen, backend, activation, True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_equals_each_expert_alone(activation: str, backend: str) -> None:
    experts = make(3, backend, activation)
    rows = torch.randn(5, D, requires_grad=True)
    out = experts(rows, torch.tensor([2, 0, 3]))
    one_hot = torch.eye(3)[torch.tensor([0, 0, 2, 2, 2])]
    torch.testing.assert_close(out, oracle(experts, rows, one_hot, activation), atol=1e-5, rtol=1e-4)
    # The gradient of a sum is an expanded tensor, which a grouped product alone refuses.
    out.sum().backward()
    for expert, live in enumerate([True, False, True]):
        for parameter in experts.expert_parameters(expert).values():
            assert bool(parameter.grad.any()) is live


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mix_equals_oracle_for_few_and_for_many_rows(activation: str) -> None:
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(100, 3, generator=generator) < torch.tensor([0.9, 0.5, 0.05])
    assert (chosen.sum(0) >= 32).tolist() == [True, True, False]
    assert_equals_oracle(torch.rand(100, 3, generator=generator) * chosen, "loop", activation, True)


def test_mix_by_hand() -> None:
    experts = Experts(2, 1, 1, activation="relu", backend="loop")
    with torch.no_grad():
        for e, (w_in, b_in, w_out, b_out) in enumerate([(1.0, 1.0, 3.0, 1.0), (2.0, 0.0, 5.0, 0.0)]):
            for name, value in {"w_in": w_in, "b_in": b_in, "w_out": w_out, "b_out": b_out}.items():
                experts.expert_parameters(e)[name].fill_(value)
    # Expert 0: 3 relu(x + 1) + 1; expert 1: 5 relu(2x).
    out = experts.mix(torch.tensor([[1.0], [2.0], [-3.0]]), sparse(torch.tensor([[1.0, 0.0], [0.5, 2.0], [0.1, 0.9]])))
    assert out.tolist() == [[7.0], [45.0], [pytest.approx(0.1)]]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_fused_gradient_in_double_precision(bias: bool, activation: str) -> None:
    experts = make(3, "loop", activation, bias).double()
    routing = sparse(CASES["a token without expert"].double())
    hidden = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
    parameters = list(experts.parameters())

    def mix(*_: Tensor) -> Tensor:
        return experts.mix(hidden, routing)

    assert torch.autograd.gradcheck(mix, (hidden, routing.weight, *parameters), fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_expert_has_zero_gradient(backend: str) -> None:
    experts = make(3, backend)
    experts.mix(torch.randn(2, D), sparse(CASES["an expert without token"])).sum().backward()
    for parameter in experts.expert_parameters(0).values():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))


@pytest.mark.parametrize("backend", BACKENDS)
def test_base_is_expert_zero_and_leaves_the_others_without_gradient(backend: str) -> None:
    experts = make(3, backend)
    hidden = torch.randn(4, D)
    out = experts.base(hidden)
    torch.testing.assert_close(out, oracle(experts, hidden, torch.tensor([[1.0, 0, 0]] * 4), "gelu"))
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in experts.expert_parameters(0).values())
    assert all(parameter.grad is None for e in (1, 2) for parameter in experts.expert_parameters(e).values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend: str) -> None:
    experts = make(4, backend)
    dense = CASES["two experts per token"]
    hidden = torch.randn(4, D, requires_grad=True)
    routing = sparse(dense)
    with torch.autocast("cpu", torch.bfloat16):
        out = experts.mix(hidden, routing)
        rows = experts(hidden.detach(), torch.tensor([1, 1, 1, 1]))
    out.sum().backward()
    expected = oracle(experts, hidden, dense, "gelu")
    assert (out.dtype, rows.dtype, routing.weight.grad.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    torch.testing.assert_close(out, expected, atol=0.1, rtol=0.05)
    assert not torch.equal(out, expected)
    assert all(parameter.grad.dtype == torch.float32 for parameter in experts.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16(backend: str) -> None:
    experts = make(4, backend)
    dense = CASES["two experts per token"]
    hidden = torch.randn(4, D)
    expected = oracle(experts, hidden, dense, "gelu")
    experts = experts.bfloat16()
    out = experts.mix(hidden.bfloat16(), sparse(dense))
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert all(parameter.grad.dtype == torch.bfloat16 for parameter in experts.parameters())
    torch.testing.assert_close(out.float(), expected, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointing_and_accumulation_change_nothing(backend: str) -> None:
    dense, hidden = CASES["two experts per token"], torch.randn(4, D, requires_grad=True)
    plain, recomputed = make(4, backend), make(4, backend)
    for _ in range(2):
        plain.mix(hidden, sparse(dense)).square().sum().backward()
        checkpoint(recomputed.mix, hidden, sparse(dense), use_reentrant=False).square().sum().backward()
    single = make(4, backend)
    single.mix(hidden, sparse(dense)).square().sum().backward()
    for parameter, same, once in zip(plain.parameters(), recomputed.parameters(), single.parameters(), strict=True):
        assert torch.equal(parameter.grad, same.grad)
        torch.testing.assert_close(parameter.grad, 2 * once.grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_evaluation_equals_training(backend: str) -> None:
    experts, hidden, routing = make(4, backend), torch.randn(4, D), sparse(CASES["two experts per token"])
    with torch.no_grad():
        quiet = experts.mix(hidden, routing)
    assert torch.equal(quiet, experts.mix(hidden, routing))


def test_frozen_experts_pass_the_gradient_on() -> None:
    dense = CASES["two experts per token"]
    experts, frozen = make(4, "loop"), make(4, "loop").requires_grad_(False)
    grads = []
    for module in (experts, frozen):
        hidden = torch.ones(4, D, requires_grad=True)
        module.mix(hidden, sparse(dense)).sum().backward()
        grads.append(hidden.grad)
    assert torch.equal(*grads)
    assert all(parameter.grad is None for parameter in frozen.parameters())


@pytest.mark.parametrize(
    ("backend", "dtype", "whole"),
    [("loop", torch.float32, False), ("grouped_mm", torch.float32, False), ("grouped_mm", torch.bfloat16, True)],
)
def test_compile(backend: str, dtype: torch.dtype, whole: bool) -> None:
    torch._dynamo.reset()
    eager, dense = make(4, backend).to(dtype), CASES["two experts per token"]
    compiled = copy.deepcopy(eager)
    mix = torch.compile(compiled.mix, backend="aot_eager", fullgraph=whole)
    hidden = torch.randn(4, D, dtype=dtype)
    outputs = [function(hidden, sparse(dense)) for function in (eager.mix, mix)]
    for output in outputs:
        output.square().sum().backward()
    assert all(parameter.grad is not None for parameter in compiled.parameters())
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(gradients(compiled), gradients(eager))


def test_state_dict_and_copy() -> None:
    experts, other = make(3, "loop"), make(3, "grouped_mm", seed=1)
    assert list(experts.state_dict())[:4] == ["w_in.0", "w_in.1", "w_in.2", "w_out.0"]
    other.load_state_dict(experts.state_dict())
    hidden, routing = torch.randn(2, D), sparse(CASES["an expert without token"])
    torch.testing.assert_close(other.mix(hidden, routing), experts.mix(hidden, routing))
    clone = copy.deepcopy(experts)
    with torch.no_grad():
        clone.w_in[1].add_(1)
    assert not torch.equal(clone.mix(hidden, routing), experts.mix(hidden, routing))
    assert torch.equal(experts.mix(hidden, routing), make(3, "loop").mix(hidden, routing))


def test_reset_parameters() -> None:
    torch.manual_seed(0)
    experts = Experts(2, 64, 256, init_std=0.02, output_std=0.005)
    assert [float(experts.w_in[e].detach().std()) for e in (0, 1)] == pytest.approx([0.02, 0.02], rel=0.05)
    assert float(experts.w_out[1].detach().std()) == pytest.approx(0.005, rel=0.05)
    assert not torch.equal(experts.w_in[0], experts.w_in[1])
    assert not experts.b_in[0].any()
    before = experts.w_in[0].clone()
    torch.manual_seed(0)
    experts.reset_parameters()
    assert torch.equal(experts.w_in[0], before)


def test_expert_parameters() -> None:
    shapes = {name: tuple(p.shape) for name, p in make(2, "loop", "swiglu").expert_parameters(1).items()}
    assert shapes == {"w_in": (2 * H, D), "b_in": (2 * H,), "w_out": (D, H), "b_out": (D,)}
    assert set(make(2, "loop", bias=False).expert_parameters(0)) == {"w_in", "w_out"}


def test_auto_is_the_loop_on_cpu() -> None:
    hidden, routing = torch.randn(4, D), sparse(CASES["two experts per token"])
    assert torch.equal(make(4, "auto").mix(hidden, routing), make(4, "loop").mix(hidden, routing))
    assert Experts(2, 5, 7).mix(torch.randn(1, 5), sparse(torch.ones(1, 2))).shape == (1, 5)


def test_double_precision_has_no_grouped_kernel():
    with pytest.raises(ConfigError, match=r"^backend='grouped_mm' has no float64: .*, or backend='loop'$"):
        make(3, "grouped_mm").double()(torch.zeros(3, 8).double(), torch.tensor([1, 1, 1]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "tanh"}, "activation='tanh' is unknown: expected one of gelu, relu, swiglu"),
        ({"backend": "cuda"}, "backend='cuda' is unknown: expected one of auto, loop, grouped_mm"),
        (
            {"backend": "grouped_mm", "d_expert": 12},
            "backend='grouped_mm' with d_model=8, d_expert=12: expected multiples of 8; change the widths or use "
            "backend='loop'",
        ),
    ],
)
def test_refusals(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Experts(**{"num_experts": 2, "d_model": 8, "d_expert": 8, **options})
    assert str(caught.value) == message
