"""A vision transformer on CIFAR-10."""

from typing import ClassVar, final

from dynarank.experiments.tasks._vit import AbstractViTTask


@final
class ViTTask(AbstractViTTask):
    """A vision transformer of six blocks, 192 wide, on CIFAR-10 with crop and flip, trained by Muon in bfloat16.

    Reference:
        Dosovitskiy et al., "An image is worth 16x16 words: transformers for image recognition at scale", ICLR 2021,
        https://arxiv.org/abs/2010.11929; from scratch instead of from a network trained on more images.
    """

    training_steps = 50 * 351
    sizes: ClassVar = {"layers": 6, "heads": 6, "width": 192}
    batch_size = 128
