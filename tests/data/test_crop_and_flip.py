"""Laws of crop_and_flip: the crops of a plain loop, all equally likely, drawn by the generator alone."""

import pytest
import torch

from dynarank.data.cifar10 import crop_and_flip


def all_crops(image: torch.Tensor, padding: int) -> list[torch.Tensor]:
    """Return every crop of one padded image, plain and mirrored, by slicing."""
    channels, height, width = image.shape
    padded = image.new_zeros(channels, height + 2 * padding, width + 2 * padding)
    padded[:, padding : padding + height, padding : padding + width] = image
    shifts = range(2 * padding + 1)
    crops = [padded[:, top : top + height, left : left + width] for top in shifts for left in shifts]
    return [view for crop in crops for view in (crop, crop.flip(2))]


def make_images(samples: int, *shape: int) -> torch.Tensor:
    return torch.rand(samples, *(shape or (3, 7, 5)), dtype=torch.float64) + 0.1


@pytest.mark.parametrize("padding", [0, 1, 4, 9])
def test_each_image_is_cropped_as_a_plain_loop_does_it(padding: int):
    images = make_images(11)
    augmented = crop_and_flip(images, padding=padding, generator=torch.Generator().manual_seed(3))

    generator = torch.Generator().manual_seed(3)
    corners = torch.randint(2 * padding + 1, (2, 11, 1), generator=generator)
    mirrored = torch.randint(2, (11, 1), generator=generator)
    for index, image in enumerate(images):
        top, left = corners[:, index, 0].tolist()
        view = 2 * ((2 * padding + 1) * top + left) + int(mirrored[index])
        assert torch.equal(augmented[index], all_crops(image, padding)[view])


def test_every_crop_is_equally_likely():
    image = make_images(1)
    augmented = crop_and_flip(image.expand(18_000, -1, -1, -1), padding=1, generator=torch.Generator().manual_seed(0))
    counts = torch.tensor([(augmented == crop).flatten(1).all(dim=1).sum() for crop in all_crops(image[0], 1)])
    assert counts.sum() == 18_000
    assert (counts - 1000).abs().max() < 150  # 18 outcomes, standard deviation 31


def test_without_padding_an_image_stays_or_is_mirrored():
    images = make_images(40, 1, 3, 4)
    augmented = crop_and_flip(images, padding=0, generator=torch.Generator().manual_seed(0))
    stays = (augmented == images).flatten(1).all(dim=1)
    assert torch.equal(augmented, torch.where(stays[:, None, None, None], images, images.flip(3)))
    assert 0 < stays.sum() < 40


def test_the_generator_alone_decides():
    images = make_images(9)
    original, generator, before = images.clone(), torch.Generator().manual_seed(0), torch.get_rng_state()
    state = generator.get_state()
    first, second = (crop_and_flip(images, generator=generator) for _ in range(2))
    generator.set_state(state)
    assert torch.equal(crop_and_flip(images, generator=generator), first)
    assert not torch.equal(first, second)
    assert torch.equal(images, original)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("samples", [0, 1, 8])
def test_shape_and_dtype_are_kept(samples: int, dtype: torch.dtype):
    images = torch.ones(samples, 3, 7, 5, dtype=dtype)
    augmented = crop_and_flip(images, generator=torch.Generator())
    assert (augmented.shape, augmented.dtype) == (images.shape, dtype)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same_crops():
    images = make_images(9)
    expected = crop_and_flip(images, generator=torch.Generator().manual_seed(0))
    augmented = crop_and_flip(images.cuda(), generator=torch.Generator().manual_seed(0))
    assert augmented.is_cuda
    assert torch.equal(augmented.cpu(), expected)


@pytest.mark.parametrize(("shape", "padding"), [((3, 7, 5), 4), ((1, 3, 7, 5), -1)])
def test_impossible_crops_are_refused(shape: tuple[int, ...], padding: int):
    with pytest.raises(ValueError, match=r"must be \(N, C, H, W\) and padding at least 0, got .*7, 5\) and"):
        crop_and_flip(torch.zeros(shape), padding=padding, generator=torch.Generator())
