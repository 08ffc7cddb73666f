"""What every low-rank layer is: an owner of a weight ``W (m, n)`` kept in one of two forms."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dynarank import cost, factors, linalg
from dynarank.factors import FactorPair, LowRankFactors
from dynarank.layers._factored import AbstractMatrixLayer, ModeChange, Point
from dynarank.layers._resize import check_resizable, is_start_of, refusal, resize_, rows_in_use, share_memory, woken


class AbstractLowRankLayer(AbstractMatrixLayer, ABC):
    """A layer whose weight matrix ``W (m, n)`` has rank at most ``rank`` and changes only through ``set_factors``.

    The *pair* form holds two ordinary parameters ``A (capacity, m)`` and ``B (capacity, n)`` with ``W = A^T B``; rows
    beyond ``rank`` are zero in both and stay zero under every gradient step. The *core* form holds one parameter
    ``S (r, r)`` between two buffers ``U (m, r)`` and ``V (n, r)``. In both, every ``.grad`` is the true gradient.

    The rank is not stored beside the factors: it is the last row that is not zero.
    """

    factor_names = ("A", "B", "S")
    basis_names = ("U", "V")
    A: nn.Parameter | None
    B: nn.Parameter | None
    S: nn.Parameter | None
    U: Tensor | None
    V: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, rows: int, columns: int, *, rank: int, rank_multiple: int, device: Any, dtype: Any) -> None:
        super().__init__()
        largest = min(rows, columns)
        if not 1 <= rank <= largest:
            raise ValueError(f"rank must be between 1 and min{rows, columns} = {largest}, got {rank}.")
        if rank_multiple < 1:
            raise ValueError(f"rank_multiple must be at least 1, got {rank_multiple}.")
        self.rank_multiple = rank_multiple
        self._rank = rank
        self._leading: int | None = None  # directions that the forward pass is restricted to
        self.multiplies_out_from: int | None = None  # rank from which the forward pass builds W; None: break-even
        self._resting: tuple[nn.Parameter, nn.Parameter] | None = None  # A and B while the layer is in the core form
        self._rows, self._columns = rows, columns
        capacity = self.capacity_for(rank)
        self.A = nn.Parameter(torch.zeros(capacity, rows, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.zeros(capacity, columns, device=device, dtype=dtype))
        self.register_parameter("S", None)
        self.register_buffer("U", None)
        self.register_buffer("V", None)

    # --- what the layer is ---------------------------------------------------------------------------------------

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Shape ``(m, n)`` of the weight as a matrix: outputs by everything else, unless ``as_matrix`` says other."""
        return self._rows, self._columns

    @property
    def rank(self) -> int:
        """Number of directions in use."""
        return self._rank

    @property
    def capacity(self) -> int:
        """Number of directions stored; those beyond ``rank`` are zero."""
        return self.S.shape[0] if self.A is None else self.A.shape[0]  # type: ignore[union-attr]

    @property
    def active_rank(self) -> int:
        """Number of leading directions that the layer computes with: all of them, unless fewer were set.

        Setting it changes no factor: it restricts the forward pass, ``weight``, ``to_dense`` and ``to_plain``, until
        it is set to None. Where the factors are diagonalised, as ``LowRankOptimizer`` keeps them, the restricted weight
        is the truncated SVD of the whole. The other directions then get a gradient of zero.
        """
        return self.rank if self._leading is None else min(self._leading, self.rank)

    @active_rank.setter
    def active_rank(self, count: int | None) -> None:
        if count is not None and not 1 <= count <= self.rank:
            raise ValueError(f"active_rank must be between 1 and the rank, {self.rank}, or None for all, got {count}.")
        self._leading = count

    @property
    def form(self) -> Literal["pair", "core"]:
        """Which of the two forms the layer is in."""
        return "pair" if self.S is None else "core"

    @property
    def max_rank(self) -> int:
        """Largest possible rank, ``min(m, n)``."""
        return min(self.matrix_shape)

    @property
    @abstractmethod
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the dense twin's weight."""

    @abstractmethod
    def _plain_twins(self, rank: int) -> tuple[Any, Any]:
        """Return the two plain torch layers into and out of rank space, on the meta device."""

    @classmethod
    def from_dense(cls, dense: Any, *, rank: int, rank_multiple: int = 1) -> "AbstractLowRankLayer":
        """Return the low-rank twin of ``dense``: the truncated SVD of its weight, and its own bias parameter.

        The global generator is not touched. A weight on the meta device gives factors on the meta device.
        """
        options = cls.dense_options(dense) | {"rank_multiple": rank_multiple}
        bias = getattr(dense, "bias", None)
        if "bias" in dense._parameters:  # an embedding knows of none
            options["bias"] = bias is not None
        layer = cls(**options, rank=rank, device="meta", dtype=dense.weight.dtype)
        layer.train(dense.training)
        if not dense.weight.is_meta:
            layer.to_empty(device=dense.weight.device)
            layer.set_weight_(dense.weight)
        layer.requires_grad_(dense.weight.requires_grad)
        if bias is not None:
            layer.bias = bias
        return layer

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start from the truncated SVD of a freshly initialised dense twin, drawn as ``torch.nn`` draws it."""
        twin: Any = self.dense_twin()
        if twin.weight.is_meta:
            return
        self.set_weight_(twin.weight)
        if self.bias is not None:
            self.bias.copy_(twin.bias)

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """Return the dense layer: ``W`` multiplied out in at least float32, and the same bias parameter."""
        left, right = (linalg.widen(part) for part in self._plain_factors())
        return self._filled(self.dense_twin("meta"), self.as_weight(left @ right), self.bias)

    @torch.no_grad()
    def to_plain(self) -> nn.Sequential:
        """Return two plain torch layers that compute the same function, the second with the same bias parameter."""
        left, right = self._plain_factors()
        rank = right.shape[0]
        first, second = self._plain_twins(rank)
        outwards = left.reshape(len(second.weight), -1, rank).mT  # (out, r, k): a kernel of the second layer is last
        return nn.Sequential(
            self._filled(first, right.reshape(first.weight.shape), None),
            self._filled(second, outwards.reshape(second.weight.shape), self.bias),
        ).train(self.training)

    def _plain_factors(self) -> tuple[Tensor, Tensor]:
        """Return ``left (m, r)`` and ``right (r, n)`` with ``W = left right``, spare rows left out."""
        point, used = self.point(), slice(self._leading)
        if isinstance(point, FactorPair):
            return point.A[used].mT, point.B[used]
        return linalg.widen(point.U[:, used]) @ linalg.widen(point.S[used, used]), point.V[:, used].mT

    def _filled(self, module: Any, weight: Tensor, bias: nn.Parameter | None) -> Any:
        like: Any = self.A if self.A is not None else self.S
        weight = weight.to(like.dtype).clone(memory_format=torch.contiguous_format)
        module.weight = nn.Parameter(weight, requires_grad=like.requires_grad)
        if "bias" in module._parameters:
            module.bias = bias
        return module.train(self.training)

    # --- the weight ----------------------------------------------------------------------------------------------

    def as_matrix(self, weight: Tensor) -> Tensor:
        """Return a weight in the shape of the dense twin's as the matrix ``(m, n)`` that is factored."""
        return weight.reshape(self.matrix_shape)

    def as_weight(self, matrix: Tensor) -> Tensor:
        """Return a matrix ``(m, n)`` in the shape of the dense twin's weight: the inverse of ``as_matrix``."""
        return matrix.reshape(self.weight_shape)

    def point(self) -> Point:
        """Return the factors in use as they are stored, without copying: the parameters' leading ``rank`` rows."""
        if self.A is not None and self.B is not None:
            return FactorPair(self.A.detach()[: self.rank], self.B.detach()[: self.rank])
        return LowRankFactors(self.U, self.S.detach(), self.V)  # type: ignore[union-attr, arg-type]

    def point_gradient(self) -> FactorPair | Tensor | None:
        """Return the gradients of the stored factors, or None where the layer took no part in the backward pass."""
        trained = [p for p in (self.A, self.B, self.S) if p is not None]
        gradients = [p.grad for p in trained]
        if all(g is None for g in gradients):
            return None
        if any(g is None for g in gradients):
            raise RuntimeError(
                "A and B of a low-rank layer must both be trainable or both frozen; one has no gradient."
            )
        return gradients[0] if len(trained) == 1 else FactorPair(*(g[: self.rank] for g in gradients))  # type: ignore[misc, index]

    def factors(self) -> LowRankFactors:
        """Return ``U, S, V`` with orthonormal bases; diagonalised when the layer is in the pair form."""
        point = self.point()
        return factors.read_pair(point) if isinstance(point, FactorPair) else point

    @torch.no_grad()
    def set_factors(self, point: Point, *, form: Literal["pair", "core"] | None = None, resize: bool = True) -> None:
        """Set the weight: the only way a layer changes. A pair sets the pair form, ``U, S, V`` the core form.

        Within the capacity the parameters are written in place and keep their identity. Beyond it, or when the form
        changes, they are replaced: an optimizer that holds the old ones must be told (``LowRankOptimizer`` is).

        Args:
            point: Factors of a matrix ``(m, n)``, of any rank from 1 to ``min(m, n)``.
            form: Form to store them in; by default that of ``point``.
            resize: Whether the capacity follows the rank. If not, and the rank fits, spare rows stay and are zeroed.

        Raises:
            ValueError: The shapes do not fit the layer.
        """
        if point.shape != self.matrix_shape or not 1 <= point.rank <= self.max_rank:
            raise ValueError(
                f"factors must be of a {self.matrix_shape} matrix with rank 1 to {self.max_rank}, "
                f"got shape {point.shape} with rank {point.rank}."
            )
        if form == "pair" and isinstance(point, LowRankFactors):
            point = factors.to_pair(factors.diagonalise(point))
        elif form == "core" and isinstance(point, FactorPair):
            point = factors.read_pair(point)
        if isinstance(point, FactorPair):
            self._set_pair(point, resize=resize)
        else:
            self._set_core(point)
        self._rank = point.rank

    def set_weight_(self, weight: Tensor, *, rank: int | None = None) -> None:
        """Set the factors to the truncated SVD of a dense weight, keeping the rank unless one is given."""
        self.set_factors(factors.from_dense(self.as_matrix(weight.detach()), rank=rank or self.rank), form=self.form)

    def capacity_for(self, rank: int) -> int:
        """Return the rows to store for ``rank``: the next ``rank_multiple``, at most ``min(m, n)``."""
        return min(cost.round_up(rank, self.rank_multiple), self.max_rank)

    @classmethod
    def smallest_of(cls, dense: Any) -> "AbstractLowRankLayer":
        """Return the twin of a dense layer with rank 1."""
        return cls.from_dense(dense, rank=1)

    def fits(self, rank: int, modes: Mapping[str, ModeChange] | None = None) -> bool:
        """Whether the pair form can take ``rank`` without a change of shape."""
        return self.form == "pair" and self.capacity == self.capacity_for(rank)

    def resize_refusal(self) -> str | None:
        """Return why the factors cannot change their shape now, or None."""
        return next((why for p in (self.A, self.B) if p is not None and (why := refusal(p)) is not None), None)

    def _set_pair(self, pair: FactorPair, *, resize: bool) -> None:
        too_small = self.A is None or self.B is None or pair.rank > self.capacity
        if too_small or (resize and not self.fits(pair.rank)):
            self._replace_pair(self.capacity_for(pair.rank))
        for parameter, values in ((self.A, pair.A), (self.B, pair.B)):
            if not is_start_of(values, parameter):
                if share_memory(values, parameter):
                    values = values.clone()  # own rows in another order
                parameter[: pair.rank] = values  # type: ignore[index]
            if pair.rank < len(parameter):  # type: ignore[arg-type]
                parameter[pair.rank :] = 0  # type: ignore[index]

    def _replace_pair(self, capacity: int) -> None:
        if self.A is not None and self.B is not None:
            changes = ((self.A, (capacity, self._rows)), (self.B, (capacity, self._columns)))
            for parameter, shape in changes:  # both or none
                check_resizable(parameter, shape)
            for parameter, shape in changes:
                resize_(parameter, shape)
            return
        shapes = ((capacity, self._rows), (capacity, self._columns))
        for name, parameter in zip("AB", woken(self._resting, shapes, like=self.S), strict=True):  # type: ignore[arg-type]
            self.register_parameter(name, parameter)
        self._resting = None
        self.register_parameter("S", None)
        self.U = self.V = None

    def _set_core(self, point: LowRankFactors) -> None:
        like = self.S if self.S is not None else self.A
        kind: dict[str, Any] = {"dtype": like.dtype, "device": like.device}  # type: ignore[union-attr]
        # Contiguous, so that a layer that is loaded computes bit for bit what the saved one did.
        U, S, V = (part.to(**kind).clone(memory_format=torch.contiguous_format) for part in (point.U, point.S, point.V))
        self.U, self.V = U, V
        if self.S is not None and self.S.shape == S.shape:
            self.S.copy_(S)
            return
        if self.A is not None and self.B is not None:
            self._resting = (self.A, self.B)  # hooks, and whoever holds them, find them again
            self.A.grad = self.B.grad = None
        self.register_parameter("S", nn.Parameter(S, requires_grad=like.requires_grad))  # type: ignore[union-attr]
        self.register_parameter("A", None)
        self.register_parameter("B", None)

    def _add_bias(self, bias: bool) -> None:
        like: Any = self.A
        self.register_parameter("bias", nn.Parameter(like.new_zeros(self.weight_shape[0])) if bias else None)

    def _kind(self, device: Any = None) -> dict[str, Any]:
        like: Any = self.A if self.A is not None else self.S
        return {"device": device or like.device, "dtype": like.dtype}

    def _dense_weight(self) -> Tensor:
        return self.as_weight(product(*self._maps()))

    def multiplies_out(self, rank: int, rows: float | None = None) -> bool:
        """Whether the forward pass builds ``W`` at a rank; the layer still adapts.

        Multiplied into ``rows`` inputs that saves ``r (m + n) - m n`` each, where that is positive, and building costs
        ``m n r``, which is small beside it where the inputs are the many pixels of an image.
        """
        entries = self._rows * self._columns
        if self.multiplies_out_from is not None:
            return rank >= self.multiplies_out_from
        saved = rank * (self._rows + self._columns) - entries
        return saved >= 0 and (rows is None or rows * saved > entries * rank)

    def _maps(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return ``down (r, n)``, the core ``(k, r)`` or None, and ``up (k, m)``: ``W = up^T core down``.

        Spare rows are in them: zeros cost less than the views that would leave them out.
        """
        k, A, B = self._leading, self.A, self.B
        if A is not None and B is not None:
            return (B, None, A) if k is None else (B[:k], None, A[:k])
        U, S, V = self.U, self.S, self.V
        if k is None:
            return V.mT, S, U.mT  # type: ignore[union-attr]
        return V[:, :k].mT, S[:k, :k], U[:, :k].mT  # type: ignore[index]

    # --- state dict ----------------------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Take the rank and the form of what is loaded; a dense ``weight`` becomes its truncated SVD."""
        weight = state_dict.get(prefix + "weight")
        if weight is not None and weight.shape == self.weight_shape:
            del state_dict[prefix + "weight"]
            pair = self._pair_of(weight)
            state_dict.update({prefix + "A": pair.A, prefix + "B": pair.B})
        self._resize_like(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self.A is not None and self.B is not None:
            self._rank = rows_in_use(self.A, self.B)
        else:
            self._rank = self.point().rank  # S is rectangular where one basis could not grow as far as the other

    def _pair_of(self, weight: Tensor) -> FactorPair:
        """Return a dense weight as a pair of the layer's rank and capacity."""
        pair = factors.to_pair(factors.from_dense(self.as_matrix(weight.detach()), rank=self.rank))
        spare = self.capacity_for(self.rank) - self.rank
        like = self._kind(weight.device)
        return FactorPair(*(torch.nn.functional.pad(part, (0, 0, 0, spare)).to(**like) for part in (pair.A, pair.B)))

    @torch.no_grad()
    def _resize_like(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Take the form and the capacity of what is about to be loaded, if its shapes fit the layer."""
        A, B, S = (state_dict.get(prefix + name) for name in "ABS")
        if A is not None and B is not None and A.dim() == B.dim() == 2:
            fits = (A.shape[1], B.shape[1]) == self.matrix_shape and 1 <= len(A) == len(B) <= self.max_rank
            if fits and (self.A is None or len(A) != self.capacity):
                self._replace_pair(len(A))
            return
        if S is None or S.dim() != 2:
            return
        sides = list(zip(self.matrix_shape, S.shape, strict=True))
        if all(1 <= side <= size for size, side in sides) and (self.S is None or S.shape != self.S.shape):
            U, V = (S.new_zeros(size, side) for size, side in sides)
            self._set_core(LowRankFactors(U, S.detach(), V))

    def extra_repr(self) -> str:
        """Shape, rank and form, as printed inside the model."""
        spare = f", capacity={self.capacity}" if self.capacity != self.rank else ""
        core = ", form=core" if self.form == "core" else ""
        active = f", active_rank={self.active_rank}" if self.active_rank != self.rank else ""
        return f"{self._describe()}, rank={self.rank}{active}{spare}{core}"

    @abstractmethod
    def _describe(self) -> str:
        """Return the options of the layer as its dense twin prints them."""


def product(down: Tensor, core: Tensor | None, up: Tensor) -> Tensor:
    """Return ``W = up^T core down (m, n)``, where the core may be missing."""
    return up.mT @ down if core is None else up.mT @ core @ down


def low_rank_layers(model: nn.Module) -> dict[str, AbstractLowRankLayer]:
    """Return every low-rank layer of ``model`` once, under its first qualified name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AbstractLowRankLayer)}
