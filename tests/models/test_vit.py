from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from helpers.flops import flop_counter
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from evomoe.errors import ConfigError
from evomoe.models.vit import ViT, to_patches
from evomoe.routing import (
    DTSGate,
    ExpertChoice,
    HashLayer,
    SinkhornExpertChoice,
    SinkhornTokenChoice,
    SoftmaxTokenChoice,
    SoftMoE,
    SparsityConstrainedExpertChoice,
    StableMoE,
    Switch,
    TopK,
)

SIZE, P, C, CLASSES, D, L, HEADS = 12, 4, 3, 5, 16, 4, 2

ROUTERS = [
    None,
    Switch,
    DTSGate,
    partial(TopK, top_k=2),
    SoftmaxTokenChoice,
    SinkhornTokenChoice,
    partial(ExpertChoice, pool="sequence", capacity_factor=1.0),
    SinkhornExpertChoice,
    SparsityConstrainedExpertChoice,
    partial(SoftMoE, slots=2),
]


def build(router=None, **options) -> ViT:
    torch.manual_seed(0)
    options = {"dropout": 0.0, "moe_every": 1 if router else 0, "num_experts": 4, **options}
    model = ViT(SIZE, P, C, CLASSES, D, L, HEADS, router=router, **options).eval()
    nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(1))  # at 0 it would show nothing
    return model


def pictures(count: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, C, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def test_patches_are_those_of_a_convolution():
    images, convolution = pictures(), nn.Conv2d(C, D, P, stride=P)
    expected = convolution(images).flatten(2).transpose(1, 2)  # (B, N, D)
    patches = F.linear(to_patches(images, P), convolution.weight.flatten(1), convolution.bias)
    torch.testing.assert_close(patches, expected)
    numbers = torch.arange(16.0).view(1, 1, 4, 4)
    assert to_patches(numbers, 2)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


@torch.no_grad()
def test_the_dense_model_is_hugging_faces_vit():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=SIZE,
        patch_size=P,
        num_channels=C,
        hidden_size=D,
        num_hidden_layers=L,
        num_attention_heads=HEADS,
        intermediate_size=4 * D,
        layer_norm_eps=1e-5,
        num_labels=CLASSES,
    )
    torch.manual_seed(1)
    theirs = transformers.ViTForImageClassification(config).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours, embeddings = build(pool="cls"), theirs.vit.embeddings
    projection = embeddings.patch_embeddings.projection
    ours.patch_embedding.load_state_dict({"weight": projection.weight.flatten(1), "bias": projection.bias})
    ours.class_token.copy_(embeddings.cls_token[0, 0])
    ours.position_embedding.weight.copy_(embeddings.position_embeddings[0])
    ours.norm.load_state_dict(theirs.vit.layernorm.state_dict())
    ours.head.load_state_dict(theirs.classifier.state_dict())
    layers = dict(theirs.named_parameters())
    for index, block in enumerate(ours.blocks):
        known = {name.partition(f".{index}.")[2]: value for name, value in layers.items() if f".{index}." in name}
        assert len(known) == 16
        take = partial(of, known)
        for name in ("weight", "bias"):
            parts = [take(part, name) for part in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"))]
            getattr(block.attention.qkv, name).copy_(torch.cat(parts))
            getattr(block.attention.output, name).copy_(take(("o_proj", "attention.output.dense"), name))
            getattr(block.attention_norm, name).copy_(take(("layernorm_before",), name))
            getattr(block.feed_forward_norm, name).copy_(take(("layernorm_after",), name))
        into, out = ("fc1", "intermediate.dense"), ("fc2", "output.dense")
        experts = block.feed_forward.experts.expert_parameters(0)
        for name, (layer, kind) in {
            "w_in": (into, "weight"),
            "b_in": (into, "bias"),
            "w_out": (out, "weight"),
            "b_out": (out, "bias"),
        }.items():
            source = take(layer, kind)
            experts[name].copy_(source if experts[name].shape == source.shape else source.t())
    images = pictures()
    torch.testing.assert_close(ours(images)[0], theirs(images).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    ("stem", "widths", "strides"),
    [("conv", [D // 2, D], [2, 2]), ("deep_conv", [D // 2, D // 2, D, D], [2, 1, 2, 1])],
)
def test_convolutions_ahead_are_those_of_a_slow_sum(stem, widths, strides):
    model, images = build(stem=stem), pictures()
    weights = [convolution.weight for convolution in model.stem.convolutions]
    assert [weight.shape for weight in weights] == [(b, a, 3, 3) for a, b in pairwise([C, *widths])]
    for norm in model.stem.norms:
        nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(2))
    hidden = images
    for weight, norm, stride in zip(weights, model.stem.norms, strides, strict=True):
        padded = torch.zeros(len(images), hidden.shape[1], *(side + 2 for side in hidden.shape[2:]))
        padded[:, :, 1:-1, 1:-1] = hidden
        rows, columns = hidden.shape[2] // stride, hidden.shape[3] // stride
        hidden = torch.empty(len(images), len(weight), rows, columns)
        for row in range(rows):
            for column in range(columns):
                top, left = stride * row, stride * column
                window = padded[:, :, top : top + 3, left : left + 3]
                hidden[:, :, row, column] = torch.einsum("bcij,ocij->bo", window, weight)
        for image in hidden:
            image -= image.mean()
            image /= (image.square().mean() + norm.eps).sqrt()
            image *= norm.weight[:, None, None]
        hidden = F.gelu(hidden)
    patches = torch.stack([hidden[:, :, row, column] for row in range(3) for column in range(3)], dim=1)
    torch.testing.assert_close(model.stem(images), patches)


@pytest.mark.parametrize(
    ("stem", "widths"), [("conv", [48, 96, 192, 384]), ("deep_conv", [48, 48, 96, 96, 192, 192, 384, 384])]
)
def test_stages_of_the_stem_are_as_wide_as_in_vit_4gf(stem, widths):
    model = ViT(224, 16, 3, 10, 384, 1, 6, moe_every=0, stem=stem)
    assert [convolution.out_channels for convolution in model.stem.convolutions] == widths


def of(known: dict[str, torch.Tensor], names: tuple[str, ...], kind: str) -> torch.Tensor:
    """The parameter under the name that this version of transformers gives it."""
    exact = {name: known[f"{name}.{kind}"] for name in names if f"{name}.{kind}" in known}
    ends = {key: value for key, value in known.items() for name in names if key.endswith(f".{name}.{kind}")}
    (value,) = exact.values() or ends.values()
    return value


@torch.no_grad()
@pytest.mark.parametrize("pool", ["gap", "cls"])
def test_what_is_pooled(pool):
    model = build(pool=pool)
    seen = []
    model.norm.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    features, routings = model.features(pictures())
    (hidden,) = seen
    assert hidden.shape == (3, 9 + (pool == "cls"), D)
    torch.testing.assert_close(features, hidden.mean(dim=1) if pool == "gap" else hidden[:, 0])
    assert routings == []
    torch.testing.assert_close(model(pictures())[0], F.linear(features, model.head.weight, model.head.bias))


@pytest.mark.parametrize(
    ("moe_every", "moe_last", "names"),
    [
        (0, None, []),
        (0, 2, []),
        (1, None, ["block_0", "block_1", "block_2", "block_3"]),
        (1, 2, ["block_2", "block_3"]),
        (2, None, ["block_1", "block_3"]),
        (2, 3, ["block_2"]),
        (1, 4, ["block_0", "block_1", "block_2", "block_3"]),
    ],
)
def test_where_the_experts_are(moe_every, moe_last, names):
    model = build(Switch if moe_every else None, moe_every=moe_every, moe_last=moe_last)
    assert list(model.moe_layers) == names
    _, routings = model(pictures())
    assert [routing.num_tokens.item() for routing in routings] == [27] * len(names)


@torch.no_grad()
@pytest.mark.parametrize(("pool", "stem"), [("gap", "patch"), ("cls", "patch"), ("gap", "conv"), ("gap", "deep_conv")])
@pytest.mark.parametrize("router", ROUTERS)
def test_an_image_of_padding_changes_nothing(router, pool, stem):
    model, images = build(router, pool=pool, stem=stem), pictures()
    valid = torch.tensor([True, False, True])
    other = torch.where(valid[:, None, None, None], images, pictures(seed=1))
    logits, routings = model(images, valid=valid)
    changed, _ = model(other, valid=valid)
    assert torch.equal(logits[valid], changed[valid])
    alone, _ = model(images[valid])
    torch.testing.assert_close(logits[valid], alone)
    assert all(routing.num_tokens == 2 * model.num_tokens for routing in routings)


@torch.no_grad()
def test_attention_needs_no_mask(monkeypatch):
    masks = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watched(*parts, attn_mask=None, **options):
        masks.append(attn_mask)
        return attend(*parts, attn_mask=attn_mask, **options)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", watched)
    build().eval()(pictures(), valid=torch.tensor([True, True, False]))
    assert masks
    assert all(mask is None for mask in masks)  # a mask would rule the fastest kernels out


def test_every_patch_sees_every_other_one():
    model = build(Switch)
    images = pictures(1).requires_grad_()
    with torch.enable_grad():
        model(images)[0].sum().backward()
    assert (images.grad != 0).all()


@torch.no_grad()
@pytest.mark.parametrize("pool", ["gap", "cls"])
@pytest.mark.parametrize(
    ("router", "options", "active"),
    [
        (None, {}, []),
        (partial(Switch, capacity_factor=None), {"moe_last": 2}, [1.0, 1.0]),
        (partial(TopK, top_k=2), {"moe_every": 2, "d_expert": 24, "shared_experts": 1}, [2.0, 2.0]),
        (None, {"stem": "conv"}, []),
        (None, {"stem": "deep_conv"}, []),
    ],
)
def test_flops_are_those_that_are_counted(pool, router, options, active):
    model = build(router, pool=pool, **options)
    with sdpa_kernel(SDPBackend.MATH), flop_counter() as counter:
        _, routings = model(pictures(7))
    assert [routing.rows / (7 * model.num_tokens) for routing in routings] == active
    assert counter.get_total_flops() == pytest.approx(7 * model.flops_per_image(active), rel=0.01)


@torch.no_grad()
@pytest.mark.parametrize("router", ROUTERS[-6:])
def test_flops_of_the_routers_of_vision_are_those_that_are_counted(router):
    model = build(router)
    with sdpa_kernel(SDPBackend.MATH), flop_counter() as counter:
        _, routings = model(pictures(7))
    active = [routing.rows / (7 * model.num_tokens) for routing in routings]
    assert counter.get_total_flops() == pytest.approx(7 * model.flops_per_image(active), rel=0.01)


@torch.no_grad()
@pytest.mark.parametrize("stem", ["patch", "conv", "deep_conv"])
def test_embedded_patches_start_with_the_deviation_of_the_positions(stem):
    torch.manual_seed(0)
    model = ViT(32, 4, 3, CLASSES, 256, 1, 4, moe_every=0, stem=stem)
    images = torch.randn(8, 3, 32, 32)
    assert model.patch_embedding(model._look_at(images)).square().mean().sqrt() == pytest.approx(0.5, rel=0.05)
    assert model.position_embedding.weight.std() == pytest.approx(0.5, rel=0.05)


@torch.no_grad()
def test_convolutions_ahead_tell_contrasts_within_an_image():
    """As a norm of each place by itself would not: the same pattern, ten times as strong on one half."""
    model, images = build(stem="conv"), pictures(1)
    pattern = images[..., : SIZE // 3].repeat(1, 1, 1, 3)
    pattern[..., SIZE // 2 :] *= 10
    patches = model.stem(pattern).view(3, 3, D)
    assert patches[:, 2].norm() > 3 * patches[:, 0].norm()


@pytest.mark.parametrize("stem", ["patch", "conv", "deep_conv"])
def test_models_of_one_seed_share_their_weights(stem):
    dense, sparse = build(stem=stem).state_dict(), build(Switch, moe_last=1, stem=stem).state_dict()
    for name in dense:
        if "blocks.3.feed_forward" not in name:
            assert torch.equal(dense[name], sparse[name]), name
    expert = build(Switch, moe_last=1, stem=stem).blocks[3].feed_forward.experts.expert_parameters(0)
    for name, parameter in build(stem=stem).blocks[3].feed_forward.experts.expert_parameters(0).items():
        assert torch.equal(expert[name], parameter)


def test_the_head_starts_at_zero():
    torch.manual_seed(0)
    model = ViT(SIZE, P, C, CLASSES, D, L, HEADS, moe_every=0)
    assert torch.equal(model(pictures())[0], torch.zeros(3, CLASSES))


@pytest.mark.parametrize("stem", ["patch", "conv", "deep_conv"])
def test_recomputed_activations_give_the_same_gradients(stem):
    gradients = []
    for checkpoint_activations in (False, True):
        model = build(Switch, dropout=0.2, stem=stem, checkpoint_activations=checkpoint_activations).train()
        torch.manual_seed(7)
        model(pictures())[0].square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        if gradient is not None:
            assert torch.equal(gradients[1][name], gradient), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"patch_size": 5},
            "image_size=12 is not divisible by patch_size=5: choose a model.patch_size",
        ),
        ({"image_size": 0}, "image_size=0: expected at least 1"),
        ({"patch_size": 0}, "patch_size=0: expected at least 1"),
        ({"channels": 0}, "channels=0: expected at least 1"),
        ({"num_classes": 0}, "num_classes=0: expected at least 1"),
        ({"num_layers": 0}, "num_layers=0: expected at least 1"),
        ({"stem": "hybrid"}, "stem='hybrid' is unknown: expected patch, the pixels of each patch, conv or deep_conv"),
        (
            {"stem": "conv", "patch_size": 3},
            "patch_size=3 under a convolutional stem, .* expected 2, 4, 8 or another power of two",
        ),
        ({"stem": "conv", "patch_size": 1}, "patch_size=1 under a convolutional stem"),
        (
            {"stem": "deep_conv", "d_model": 15, "num_heads": 3},
            "d_model=15 under a convolutional stem is not divisible by 2, half of patch_size=4",
        ),
        ({"pool": "max"}, "pool='max' is unknown: expected gap, the mean of the patches, or cls"),
        ({"moe_last": 5}, "moe_last=5 of num_layers=4 blocks: expected 1 to 4, or null for all"),
        ({"moe_last": 0}, "moe_last=0 of num_layers=4 blocks"),
        ({"moe_every": 2, "moe_last": 1, "router": Switch}, "moe_every=2 leaves no MoE layer among num_layers=1"),
        ({"num_heads": 3}, "d_model=16 is not divisible by num_heads=3"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    sizes = {
        "image_size": SIZE,
        "patch_size": P,
        "channels": C,
        "num_classes": CLASSES,
        "d_model": D,
        "num_layers": L,
        "num_heads": HEADS,
        "moe_every": 0,
    }
    with pytest.raises(ConfigError, match=message) as caught:
        ViT(**{**sizes, **settings})
    assert "\n" not in str(caught.value)


def test_images_of_another_size_are_refused():
    with pytest.raises(ConfigError, match="images of 3 x 8 x 8, but the model is built for 3 x 12 x 12"):
        build()(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("router", [HashLayer, StableMoE])
def test_a_router_by_word_says_that_patches_are_none(router):
    model = build(partial(router, vocab_size=10))
    with pytest.raises(ConfigError, match=f"{router.__name__} routes by word, and the model passed no token_ids"):
        model(pictures())
