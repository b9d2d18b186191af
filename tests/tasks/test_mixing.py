from __future__ import annotations

import pytest
import torch
from torch.distributions import Beta

from evomoe.tasks.mixing import cut_mix, mix_up

B, SIZE = 6, 8


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Images of one grey, their number."""
    return torch.arange(float(B))[:, None, None, None].expand(B, 1, SIZE, SIZE), torch.arange(B)


@pytest.mark.parametrize("seed", range(5))
def test_mixup_blends_images_and_labels_by_one_share(seed):
    torch.manual_seed(seed)
    images, labels, other, share = mix_up(*batch(), alpha=1.0)
    assert 0 <= share <= 1
    assert torch.equal(labels, torch.arange(B))
    assert sorted(other.tolist()) == list(range(B))
    expected = share * labels + (1 - share) * other
    torch.testing.assert_close(images[:, 0], expected[:, None, None].expand(B, SIZE, SIZE))


@pytest.mark.parametrize("seed", range(20))
def test_cutmix_pastes_one_box_and_counts_its_pixels(seed):
    torch.manual_seed(seed)
    given, numbers = batch()
    images, labels, other, share = cut_mix(given, numbers, alpha=1.0)
    changed = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    for image, first, second in zip(images[:, 0], labels, other, strict=True):
        assert ((image == first) | (image == second)).all()
        if first != second:
            changed = image == second
            assert share == pytest.approx(1 - changed.float().mean().item())
    rows, columns = changed.any(dim=1).nonzero(), changed.any(dim=0).nonzero()
    if len(rows):  # the changed pixels fill a box
        box = changed[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert box.all()
        assert box.sum() == changed.sum()
    assert torch.equal(given[:, 0, 0, 0], numbers.float())  # the batch itself is left as it was


@pytest.mark.parametrize("mix", [mix_up, cut_mix])
def test_half_precision_draws_the_same_shares(mix):
    shares = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)  # as Lightning does under bf16-true
        try:
            shares.append(mix(*batch(), alpha=0.4).share)
        finally:
            torch.set_default_dtype(torch.float32)
    assert shares[0] == shares[1]


@pytest.mark.parametrize("mix", [mix_up, cut_mix])
def test_the_same_seed_mixes_alike(mix):
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(mix(*batch(), alpha=0.4))
    assert all(torch.equal(first, second) for first, second in zip(results[0][:3], results[1][:3], strict=True))
    assert results[0].share == results[1].share


def test_shares_have_the_distribution_that_was_asked_for():
    torch.manual_seed(0)
    shares = torch.tensor([mix_up(*batch(), alpha=0.3).share for _ in range(1000)])
    expected = Beta(0.3, 0.3)
    assert shares.mean().item() == pytest.approx(expected.mean.item(), abs=0.04)
    assert shares.var().item() == pytest.approx(expected.variance.item(), rel=0.1)
