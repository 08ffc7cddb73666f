"""The low-rank twin of ``nn.Embedding``."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynarank.layers.base import AbstractLowRankLayer

UNSUPPORTED = {
    "max_norm": "it rescales the rows that are looked up, in place, and factors do not store these rows",
    "scale_grad_by_freq": "gradients divided by counts are not the gradients of the factors",
    "sparse": "every row that is looked up moves the whole factor B, so gradients are dense",
}


class LowRankEmbedding(AbstractLowRankLayer):
    """A table whose rows are looked up and whose matrix has low rank: ``y = (A^T)[x] B`` with ``W = A^T B``.

    The forward pass gathers rows of ``A^T`` and multiplies them by ``B``; it never builds ``W``. Under autocast the
    output keeps the dtype of the factors, as that of ``nn.Embedding`` does. The row of ``padding_idx`` is zero, always:
    low-rank steps move all rows together, so that no other value could stay as it is. Lookups of it give no gradient.

    Args:
        num_embeddings: Number ``m`` of rows.
        embedding_dim: Length ``n`` of a row.
        padding_idx: Row that is zero and stays so; counted from the end where negative.
        rank: Rank to start with. The factors start at the truncated SVD of a freshly initialised ``nn.Embedding``.
        rank_multiple: Store factors in multiples of this many rows.
        device: Where to store the factors.
        dtype: Type of the factors. Decompositions run in at least float32.

    Shape:
        Input ``(*)``, integers below ``num_embeddings``, output ``(*, embedding_dim)``; ``A (capacity, m)``,
        ``B (capacity, n)``.

    Raises:
        ValueError: ``rank`` or ``padding_idx`` is out of range; of ``from_dense``, the dense layer has ``max_norm``,
            ``scale_grad_by_freq`` or ``sparse``; whenever a dense weight is given, its padding row is not zero.

    Example:
        >>> layer = LowRankEmbedding(20, 10, padding_idx=0, rank=3)
        >>> layer(torch.tensor([[4, 0]])).shape, layer.A.shape, layer.B.shape
        (torch.Size([1, 2, 10]), torch.Size([3, 20]), torch.Size([3, 10]))
        >>> layer(torch.tensor(0)).any()
        tensor(False)

    Reference:
        Z. Lan, M. Chen, S. Goodman, K. Gimpel, P. Sharma, R. Soricut, "ALBERT: A lite BERT for self-supervised learning
        of language representations", ICLR 2020, https://arxiv.org/abs/1909.11942, Section 3.1. There the two factors
        are trained as they are; here the table is on the manifold of matrices of rank ``r``.
    """

    dense_type = nn.Embedding
    bias = None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        rank: int,
        rank_multiple: int = 1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            num_embeddings, embedding_dim, rank=rank, rank_multiple=rank_multiple, device=device, dtype=dtype
        )
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            allowed = f"between {-num_embeddings} and {num_embeddings - 1}"
            raise ValueError(f"padding_idx must be {allowed}, got {padding_idx}.")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        self.reset_parameters()

    @classmethod
    def dense_options(cls, dense: Any) -> dict[str, Any]:
        """Return the options that this layer shares with ``nn.Embedding``.

        Raises:
            ValueError: The dense layer has an option that low-rank factors cannot follow.
        """
        if reason := unsupported_option(dense):
            raise ValueError(f"{cls.__name__} cannot replace this nn.Embedding: {reason}. Keep it dense.")
        names = ("num_embeddings", "embedding_dim", "padding_idx")
        return {name: getattr(dense, name) for name in names}

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the dense twin's weight, ``(num_embeddings, embedding_dim)``."""
        return self.matrix_shape

    def as_matrix(self, weight: Tensor) -> Tensor:
        """Return the weight itself, whose padding row must be zero.

        Raises:
            ValueError: It is not.
        """
        if self.padding_idx is not None and not weight.is_meta and bool(weight[self.padding_idx].any()):
            raise ValueError(
                f"the row of padding_idx = {self.padding_idx} must be zero: low-rank training cannot keep another "
                "value. Zero it, or keep the embedding dense."
            )
        return weight

    def as_weight(self, matrix: Tensor) -> Tensor:
        """Return the matrix with its padding row at zero."""
        return self._without(matrix, torch.arange(self.num_embeddings, device=matrix.device))

    def forward(self, x: Tensor) -> Tensor:
        """Return the rows ``x`` of ``W``; ``(*)`` gives ``(*, n)``."""
        down, core, up = self._maps()
        rows = self._without(F.embedding(x, up.mT), x)  # (*, r)
        z = rows if core is None else rows @ core
        return (z @ down).to(rows.dtype)

    def _without(self, rows: Tensor, indices: Tensor) -> Tensor:
        """Return rows ``(*, k)`` with those at zero whose index ``(*)`` is that of the padding."""
        return rows if self.padding_idx is None else rows.masked_fill((indices == self.padding_idx).unsqueeze(-1), 0)

    def dense_twin(self, device: Any = None) -> nn.Embedding:
        """Return a fresh ``nn.Embedding`` with the same options."""
        return nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, **self._kind(device))

    @torch.no_grad()
    def to_plain(self) -> nn.Sequential:
        """Return ``nn.Embedding(m, r)`` and ``nn.Linear(r, n)`` without bias that compute the same function."""
        left, right = self._plain_factors()
        first, second = self._plain_twins(right.shape[0])
        layers = self._filled(first, self.as_weight(left), None), self._filled(second, right.mT, None)
        return nn.Sequential(*layers).train(self.training)

    def _plain_twins(self, rank: int) -> tuple[nn.Embedding, nn.Linear]:
        kind = self._kind("meta")
        first = nn.Embedding(self.num_embeddings, rank, self.padding_idx, **kind)
        return first, nn.Linear(rank, self.embedding_dim, bias=False, **kind)

    def _describe(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}"


def unsupported_option(dense: Any) -> str:
    """Return which option of an ``nn.Embedding`` stands against low-rank factors, and why; empty where none does.

    Example:
        >>> unsupported_option(nn.Embedding(3, 2)), unsupported_option(nn.Embedding(3, 2, sparse=True))
        ('', 'sparse=True: every row that is looked up moves the whole factor B, so gradients are dense')
    """
    found = ((name, getattr(dense, name, None), why) for name, why in UNSUPPORTED.items())
    return next((f"{name}={value}: {why}" for name, value, why in found if value not in (None, False)), "")
