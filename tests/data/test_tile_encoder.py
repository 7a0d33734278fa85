"""What the autoencoder is given: tiles and hints, turned in pixels, each once; what does not fit is named."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

from ray_pipeline.data.encode_job import EncodeJob
from ray_pipeline.data.hint_registry import make_hint
from ray_pipeline.data.hints import HINTS
from ray_pipeline.data.listing import list_tiles
from ray_pipeline.data.rejected import Rejected
from ray_pipeline.data.tile_encoder import TileEncoder
from ray_pipeline.data.tile_reader import Request
from ray_pipeline.data.tile_table import TileRow
from ray_pipeline.data.tiles import read_tile, write_tile
from ray_pipeline.errors import UserError
from ray_pipeline.sections import PAIRED_TYPES

SIDE = 64
COLUMNS = ("latent", *(f"hint.{name}" for name in HINTS), *(f"simulated.{name}" for name in PAIRED_TYPES))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def job(job_for, tiny_data) -> EncodeJob:
    return job_for(tiny_data, variants=8)


@pytest.fixture(scope="module")
def encoder(job) -> TileEncoder:
    return TileEncoder(job, use_gpu=False)


@pytest.fixture(scope="module")
def rows(job) -> list[TileRow]:
    """Training tiles; the first has no partner, the next that of low resolution, the third both, and so on."""
    rows = list_tiles(job).rows["train"]
    return [replace(row, partners={h: row.partners[h] for h in PAIRED_TYPES[: k % 3]}) for k, row in enumerate(rows)]


@pytest.fixture(scope="module")
def network(tiny_autoencoder) -> AutoencoderTiny:
    return AutoencoderTiny.from_pretrained(tiny_autoencoder)


@pytest.fixture
def passed(encoder):
    """Counts of images in the batches that pass the autoencoder."""
    sizes = []
    hook = encoder.autoencoder.network.encoder.register_forward_hook(lambda _, images, __: sizes.append(len(images[0])))
    yield sizes
    hook.remove()


def latents_of(network: AutoencoderTiny, images: Sequence[np.ndarray]) -> np.ndarray:
    """What plain diffusers makes of images, one at a time."""
    with torch.no_grad():
        return np.concatenate([network.encode(torch.tensor(image)[None, None]).latents.numpy() for image in images])


def turns(image: np.ndarray) -> list[np.ndarray]:
    """The eight symmetries of the square by transposing and reversing axes: quarter turns against the clock, and each
    mirrored left to right."""
    quarter = [image, image.T[::-1], image[::-1, ::-1], image.T[:, ::-1]]
    return [np.ascontiguousarray(turned) for turned in (*quarter, *(turned[:, ::-1] for turned in quarter))]


def latents(encoder: TileEncoder, requests: Sequence[Request]) -> np.ndarray:
    """Of tiles that are all good."""
    values, bad = encoder.encode(requests)
    assert bad == {}
    return values


def check_rounded(found: np.ndarray, exact: np.ndarray) -> None:
    """fp16 `found` is fp32 `exact` rounded, by at most 2^-11 of the value. Sums in another order, as in a batch of
    another size, changed latents of up to 0.11 by 1e-8; 5e-7 leaves room for other processors."""
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, exact, rtol=2**-11, atol=5e-7)


def check_same_but_for_rounding(one: np.ndarray, other: np.ndarray) -> None:
    """Both fp16; where the sums above fall on two sides of a border of rounding, one unit in the last place apart."""
    assert one.dtype == other.dtype == np.float16
    unit = np.spacing(np.maximum(np.abs(one), np.abs(other))).astype(np.float32)
    assert (np.abs(one.astype(np.float32) - other.astype(np.float32)) <= unit + 5e-7).all()
    assert (one == other).mean() > 0.99


def image_of(column: str, row: TileRow, variant: int, job: EncodeJob) -> np.ndarray:
    """Pixels of one column of a tile that has both partners."""
    tile = turns(read_tile(Path(job.root, row.path)))[variant]
    kind, _, hint = column.partition(".")
    if kind == "latent":
        return tile
    given = kind == "hint" and hint in PAIRED_TYPES
    partner = turns(read_tile(Path(job.root, row.partners[hint][0])))[variant] if given else None
    if given and hint == "denoising":
        return partner
    return make_hint(hint, tile, partner, row.id, variant, job.hint_settings, row.psf_fwhm_px)


@pytest.mark.parametrize("variants", [range(8), (5, 0)], ids=["all", "two"])
def test_tile_and_hints_are_turned_in_pixels_alike(job, encoder, rows, network, variants):
    row = rows[2]
    assert set(row.partners) == set(PAIRED_TYPES)
    values = latents(encoder, [Request(row, variants, COLUMNS)])
    assert values.shape == (1, len(variants), len(COLUMNS), 4, SIDE // 8, SIDE // 8)
    for place, variant in enumerate(variants):
        images = [image_of(column, row, variant, job) for column in COLUMNS]
        check_rounded(values[0, place], latents_of(network, images))


def test_a_latent_is_never_turned(encoder, rows):
    """The autoencoder sees turned pixels; its latent of them is not the turned latent of the others."""
    values = latents(encoder, [Request(rows[2], range(8), ("latent", "hint.denoising"))])[0].astype(np.float32)
    for variant in range(1, 8):
        for column in range(2):
            turned = [turns(channel)[variant] for channel in values[0, column]]
            assert np.abs(values[variant, column] - turned).max() > 0.01 * np.abs(turned).max()


def test_without_a_partner_hint_and_simulated_hint_are_one_and_pass_once(encoder, rows, passed):
    columns = ("latent", "hint.denoising", "hint.super_resolution", "simulated.super_resolution", "simulated.denoising")
    for row, images in zip(rows[:3], (3, 4, 5), strict=True):
        passed.clear()
        values = latents(encoder, [Request(row, (0, 3), columns)])[0]
        assert passed == [4] * -(-2 * images // 4)
        for hint in PAIRED_TYPES:
            given, made = (values[:, columns.index(f"{kind}.{hint}")] for kind in ("hint", "simulated"))
            if hint in row.partners:
                assert not np.isclose(given, made, rtol=0.01).all(axis=(1, 2, 3)).any()
            else:
                np.testing.assert_array_equal(given, made)


def test_a_simulated_hint_does_not_depend_on_whether_there_is_a_partner(encoder, rows):
    with_partner, without = rows[2], replace(rows[2], partners={})
    found = [
        latents(encoder, [Request(row, (1,), (column,))])
        for row, column in ((with_partner, "simulated.denoising"), (without, "hint.denoising"))
    ]
    np.testing.assert_array_equal(*found)


def test_images_pass_in_full_batches_and_come_back_in_their_places(encoder, rows, passed):
    requests = [Request(row, (0, 1), COLUMNS[:3]) for row in rows[:5]]
    values = latents(encoder, requests)
    assert passed == [4] * 8  # 5 tiles, 2 variants, 3 images; the last batch is filled up
    for request, value in zip(requests, values, strict=True):
        check_same_but_for_rounding(latents(encoder, [request])[0], value)


def test_equal_requests_give_equal_bits(job, encoder, rows):
    requests = [Request(row, (6, 2), COLUMNS) for row in rows[:4]]
    first = latents(encoder, requests)
    assert latents(encoder, requests).tobytes() == first.tobytes()
    assert latents(TileEncoder(job, use_gpu=False), requests).tobytes() == first.tobytes()


@pytest.fixture
def moved(job, tmp_path) -> EncodeJob:
    """The job on a copy of its data, in a folder with spaces and a letter beyond ASCII."""
    return replace(job, root=str(shutil.copytree(job.root, tmp_path / "mit Leerzeichen \u00b5")))


def test_data_may_lie_anywhere(moved, encoder, rows):
    requests = [Request(row, (4,), COLUMNS) for row in rows[:3]]
    found = latents(TileEncoder(moved, use_gpu=False), requests)
    assert found.tobytes() == latents(encoder, requests).tobytes()


def test_simulated_hints_are_drawn_anew_for_each_variant(moved, rows):
    y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    disc = np.where(np.hypot(x, y) < 20, 0.6, 0.2)  # one and the same in every variant
    write_tile(Path(moved.root, rows[2].path), disc)
    values = latents(TileEncoder(moved, use_gpu=False), [Request(rows[2], range(8), ("latent", "simulated.denoising"))])
    tiles, hints = values[0].swapaxes(0, 1)
    check_same_but_for_rounding(tiles, np.broadcast_to(tiles[:1], tiles.shape))
    assert len({hint.tobytes() for hint in hints}) == 8


def test_only_the_partners_that_are_asked_for_are_read(moved, rows):
    row = rows[2]
    for (partner,) in row.partners.values():
        Path(moved.root, partner).unlink()
    encoder = TileEncoder(moved, use_gpu=False)
    latents(
        encoder, [Request(row, (0,), ("latent", "hint.canny", "simulated.denoising", "simulated.super_resolution"))]
    )
    for hint in PAIRED_TYPES:
        _, bad = encoder.encode([Request(row, (0,), ("latent", f"hint.{hint}"))])
        assert bad == {0: Rejected(row.id, row.partners[hint][0], "no such image file; check the path.")}


def test_bad_tiles_come_back_with_their_reasons_and_change_no_other_latent(moved, rows):
    """The good ones are the same bits as in a request of them alone: a bad tile takes no place in a batch."""
    requests = [Request(row, (0, 3), ("latent", "hint.denoising")) for row in rows[:6]]
    encoder = TileEncoder(moved, use_gpu=False)
    good = latents(encoder, [requests[k] for k in (0, 2, 3, 5)])
    Path(moved.root, rows[1].path).unlink()
    write_tile(Path(moved.root, rows[4].path), np.full((SIDE, SIDE), 0.5))
    values, bad = encoder.encode(requests)
    assert {number: (wrong.id, wrong.path) for number, wrong in bad.items()} == {
        number: (rows[number].id, rows[number].path) for number in (1, 4)
    }
    assert bad[1].reason.startswith("no such image file")
    assert bad[4].reason.startswith("found a constant tile")
    assert values[[0, 2, 3, 5]].tobytes() == good.tobytes()


def test_when_every_tile_is_bad_nothing_passes_the_autoencoder(moved, rows):
    for row in rows[:3]:
        Path(moved.root, row.path).unlink()
    encoder = TileEncoder(moved, use_gpu=False)
    encoder.autoencoder.network = None
    _, bad = encoder.encode([Request(row, (0,), ("latent",)) for row in rows[:3]])
    assert list(bad) == [0, 1, 2]


@pytest.mark.parametrize("scale", [float("nan"), 1e9])
def test_a_latent_that_fp16_cannot_hold_is_an_error_that_names_its_tile(job, rows, scale):
    encoder = TileEncoder(job, use_gpu=False)
    encoder.autoencoder.network.encoder.layers[-1].weight *= scale
    with pytest.raises(UserError, match=rf"fp16 cannot hold for latent of {Path(job.root, rows[0].path)}; .*fp32"):
        latents(encoder, [Request(row, (0,), ("latent",)) for row in rows[:3]])


def test_only_a_few_tiles_are_read_ahead_of_the_autoencoder(job, rows):
    # a shard of 1024 tiles of 512 px with four hints and eight variants is 43 GB of pixels
    encoder = TileEncoder(job, use_gpu=False)
    requests = [Request(row, (0, 1), ("latent",)) for row in rows]
    read = []
    images_of = encoder.reader.images
    encoder.reader.images = lambda request: read.append(request.row.id) or images_of(request)
    images = encoder._read(requests)
    for number, row in enumerate(rows):
        places = next(images)
        assert [place for place, _ in places] == [(0, 0), (1, 0)]
        tile = turns(read_tile(Path(job.root, row.path)))
        np.testing.assert_array_equal([image for _, image in places], tile[:2])
        assert len(read) <= number + 6
    assert next(images, None) is None
    assert sorted(read) == sorted(row.id for row in rows)
