"""A small vision transformer on CIFAR-10, to compare ways of training in minutes."""

from typing import ClassVar, final

from dynarank.experiments.tasks._vit import AbstractViTTask


@final
class SmallViTTask(AbstractViTTask):
    """A vision transformer of four blocks, 128 wide, on CIFAR-10 with crop and flip, trained by Muon in bfloat16.

    Reference:
        Dosovitskiy et al., "An image is worth 16x16 words: transformers for image recognition at scale", ICLR 2021,
        https://arxiv.org/abs/2010.11929; from scratch instead of from a network trained on more images.
    """

    training_steps = 1000
    sizes: ClassVar = {"layers": 4, "heads": 2, "width": 128}
    batch_size = 64
