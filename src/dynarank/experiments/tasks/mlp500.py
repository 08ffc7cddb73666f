"""A multilayer perceptron with hidden layers of 500 units on MNIST."""

from typing import final

from dynarank.experiments.tasks._mlp import AbstractMLPTask


@final
class MLP500Task(AbstractMLPTask):
    """Four hidden layers of 500 units on MNIST, trained by Muon.

    Reference:
        One of the networks of Schotthöfer, Zangrando, Kusch, Ceruti, Tudisco, "Low-rank lottery tickets", NeurIPS 2022,
        https://arxiv.org/abs/2205.13571, there trained by Adam.
    """

    width = 500
