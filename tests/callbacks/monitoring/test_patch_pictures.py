from __future__ import annotations

import io

import lightning as L
import numpy as np
import pytest
import torch
from data.tiny_images import Drawn
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from evomoe.callbacks.monitoring.patch_pictures import (
    GAP,
    PatchPictures,
    draw_soft,
    draw_sparse,
    encode_png,
    heat,
    palette,
    patch_weights,
    show,
    slot_weights,
    spread,
    stack,
    tint,
)
from evomoe.data import ImageDataModule
from evomoe.errors import ConfigError
from evomoe.models.vit import ViT
from evomoe.routing import SoftMoE, SparseRouting, TopK
from evomoe.tasks import ImageClassification, Optimization


def sparse(tokens: int, chosen: list[list[tuple[int, float]]]) -> SparseRouting:
    """For each expert the tokens that it works for, with their weights."""
    return SparseRouting(
        token=torch.tensor([token for of_expert in chosen for token, _ in of_expert]),
        weight=torch.tensor([weight for of_expert in chosen for _, weight in of_expert]),
        tokens_per_expert=torch.tensor([len(of_expert) for of_expert in chosen]),
        scores=torch.zeros(tokens, len(chosen)),
        num_tokens=torch.tensor(tokens),
        dropped=torch.tensor(0),
    )


def test_weights_of_a_sparse_routing_by_patch():
    """Two images of four patches behind a class token; token 6 has two experts, and token 4 one of weight 0."""
    routing = sparse(10, [[(0, 1.0), (1, 0.5), (6, 0.3)], [(4, 0.0), (6, 0.7), (9, 1.0)]])
    weights = patch_weights(routing, images=2, num_patches=4)
    assert weights.shape == (2, 4, 2)
    expected = [[[0.5, 0], [0, 0], [0, 0], [0, 0]], [[0.3, 0.7], [0, 0], [0, 0], [0, 1]]]
    np.testing.assert_allclose(weights, expected, atol=1e-7)
    assert (weights > 0).sum(axis=2).tolist() == [[1, 0, 0, 1], [2, 0, 0, 1]]


def test_weights_of_slots_have_the_first_ones_of_all_experts_before_the_second_ones():
    dispatch = torch.rand(2, 5, 3, 2, generator=torch.Generator().manual_seed(0))  # (G, S, E, C)
    weights = slot_weights(dispatch, images=2, num_patches=4)
    np.testing.assert_array_equal(weights, dispatch[:, 1:].transpose(2, 3).numpy())
    np.testing.assert_array_equal(slot_weights(dispatch.view(1, 10, 3, 2), images=2, num_patches=4), weights)
    shown = weights.reshape(2, 4, -1)
    np.testing.assert_array_equal(shown[:, :, 2], dispatch[:, 1:, 2, 0].numpy())
    np.testing.assert_array_equal(shown[:, :, 4], dispatch[:, 1:, 1, 1].numpy())


def test_values_land_on_their_patches():
    image = np.zeros((6, 6, 3), np.uint8)
    values = np.array([[1], [2], [3], [4]])
    assert spread(values, image)[:, :, 0].tolist() == [[1] * 3 + [2] * 3] * 3 + [[3] * 3 + [4] * 3] * 3


def test_a_patch_has_the_colour_of_its_heaviest_expert():
    image = np.full((2, 2, 3), 100, np.uint8)
    colours = np.array([[255, 0, 0], [0, 0, 200]], np.uint8)
    weights = np.array([[0.2, 0.8], [1.0, 0.0], [0.0, 0.0], [0.0, 0.1]])
    blue, red, grey = [40, 40, 160], [193, 40, 40], [100, 100, 100]
    assert tint(image, weights, colours).tolist() == [[blue, red], [grey, blue]]


def test_heat_goes_from_black_to_white():
    image = np.zeros((2, 2, 3), np.uint8)
    shown = heat(image, np.array([0, 1 / 3, 2 / 3, 1]))
    assert shown.reshape(4, 3).tolist() == [[0, 0, 0], [255, 0, 0], [255, 255, 0], [255, 255, 255]]


def test_colours_of_experts_differ():
    for number in (2, 8, 32):
        assert len({tuple(colour) for colour in palette(number).tolist()}) == number


def test_images_are_enlarged_by_whole_numbers():
    shown = show(np.array([[[0.0, 1.0], [0.5, 2.0]]]))  # (C, H, W)
    assert shown.shape == (128, 128, 3)
    assert shown[::64, ::64, 0].tolist() == [[0, 255], [128, 255]]
    assert show(np.zeros((3, 50, 50))).shape == (150, 150, 3)


@pytest.mark.parametrize(
    ("channels", "shown"),
    [
        ([1.0], [255] * 3),
        ([1.0, 0.2], [153] * 3),
        ([1.0, 0.2, 0.4], [255, 51, 102]),
        ([1.0, 0.2, 0.4, 0], [255, 51, 102]),
    ],
)
def test_an_image_has_any_number_of_channels(channels, shown):
    assert show(np.array(channels)[:, None, None])[0, 0].tolist() == shown


def test_a_picture_has_a_row_per_image_and_a_legend():
    images = [np.zeros((128, 128, 3), np.uint8)] * 2
    weights = np.zeros((2, 16, 4))
    weights[:, :, 2] = 1
    picture = draw_sparse(images, weights)
    assert picture.shape == (2 * (128 + GAP) + 4 * GAP, 3 * (128 + GAP), 3)
    colours = palette(4)
    assert picture[-1, [0, 100, 250, 390]].tolist() == colours[[0, 1, 2, 3]].tolist()
    assert picture[5, 128 + GAP + 5].tolist() == (0.6 * colours[2]).astype(np.uint8).tolist()
    assert picture[5, 2 * (128 + GAP) + 5].tolist() == [255, 255, 255]  # one expert is the most of this picture
    assert (stack([[np.zeros((2, 2, 3), np.uint8)]])[-1] == 255).all()


def test_a_soft_picture_has_what_slots_read_above_what_patches_receive():
    image, cell = np.full((128, 128, 3), 100, np.uint8), 128 + GAP
    dispatch, combine = np.zeros((1, 4, 2, 2)), np.zeros((1, 4, 2, 2))  # (B, N, C, E)
    dispatch[0, 3, 1, 0] = 0.5  # the third slot, which is expert 0's second, reads the last patch
    combine[0, 0, :, 1] = 0.3  # the first patch receives most of expert 1, by both of its slots
    combine[0, 0, 1, 0] = 0.4
    picture = draw_soft([image], dispatch, combine, slots=3)
    assert picture.shape == (2 * cell + 4 * GAP, 4 * cell, 3)
    read, received = (picture[top : top + 128].reshape(128, -1, 3) for top in (0, cell))
    assert (read[:, :128] == 100).all()
    last, first = (127, 127), (0, 0)
    for column, (of_slot, of_patch) in enumerate([(0, 0), (0, 255), (255, 255)], start=1):
        assert read[last[0], column * cell + last[1]].tolist() == [of_slot] * 3
        assert received[first[0], column * cell + first[1]].tolist() == [of_patch] * 3
    colours = palette(2)
    assert received[0, 0].tolist() == (0.4 * 100 + 0.6 * colours[1]).astype(np.uint8).tolist()
    assert received[127, 127].tolist() == [100] * 3
    assert picture[-1, [0, -1]].tolist() == colours.tolist()
    assert draw_soft([image], dispatch, combine, slots=9).shape == (2 * cell + 4 * GAP, 5 * cell, 3)


def test_an_image_of_padding_has_black_slots():
    nothing = np.zeros((1, 16, 1, 4))
    picture = draw_soft([np.full((128, 128, 3), 9, np.uint8)], nothing, nothing, slots=2)
    for top in (0, 128 + GAP):
        assert (picture[top : top + 128, 128 + GAP : 2 * 128 + GAP] == 0).all()


def test_png_files_are_read_by_others():
    image = pytest.importorskip("PIL.Image")
    picture = np.random.default_rng(0).integers(0, 256, (7, 5, 3)).astype(np.uint8)
    with image.open(io.BytesIO(encode_png(picture))) as read:
        read.verify()
    with image.open(io.BytesIO(encode_png(picture))) as read:
        assert read.mode == "RGB"
        assert np.array_equal(np.asarray(read), picture)


def fit(folder, *, grown: bool = True, router=TopK, precision: str = "32-true", channels: int = 3) -> None:
    torch.manual_seed(0)
    model = ViT(8, 4, channels, 3, 16, 2, 2, num_experts=4, moe_every=1, router=router, dropout=0.0)
    if not grown:
        for layer in model.moe_layers.values():
            layer.live_experts = 1
    trainer = L.Trainer(
        accelerator="cpu",
        precision=precision,
        max_steps=4,
        val_check_interval=2,
        logger=TensorBoardLogger(folder, name="", version="tensorboard"),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
        default_root_dir=folder,
        callbacks=[PatchPictures(images=2)],
    )
    data = ImageDataModule(Drawn(channels=channels), batch_size=4)
    trainer.fit(ImageClassification(model, Optimization(warmup=0)), datamodule=data)
    trainer.validate(ImageClassification(model, Optimization()), datamodule=data, verbose=False)


def test_each_validation_of_a_fit_is_drawn_for_each_layer(tmp_path):
    fit(tmp_path)
    names = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert names == {f"block_{block}_step_{step:08}.png" for block in (0, 1) for step in (2, 4)}
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    logged = events.Images("val_moe/block_1/patches")
    assert [image.step for image in logged] == [2, 4]
    assert logged[-1].encoded_image_string == (tmp_path / "pictures" / "block_1_step_00000004.png").read_bytes()
    assert (logged[-1].height, logged[-1].width) == (2 * (128 + GAP) + 4 * GAP, 3 * (128 + GAP))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("router", [TopK, SoftMoE])
def test_each_precision_is_drawn(tmp_path, precision, router):
    fit(tmp_path, precision=precision, router=router)
    assert len(list((tmp_path / "pictures").iterdir())) == 4


def test_images_of_two_channels_are_drawn(tmp_path):
    fit(tmp_path, channels=2)
    assert len(list((tmp_path / "pictures").iterdir())) == 4


def test_a_layer_with_one_expert_has_nothing_to_show(tmp_path):
    fit(tmp_path, grown=False)
    assert not (tmp_path / "pictures").exists()


@pytest.mark.parametrize("options", [{"images": 0}, {"slots": 0}])
def test_options_out_of_range_are_refused(options):
    (name,) = options
    with pytest.raises(ConfigError, match=f"callbacks.pictures.{name}=0: expected at least 1"):
        PatchPictures(**options)
