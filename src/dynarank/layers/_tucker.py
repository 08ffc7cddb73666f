"""What a layer with a weight in Tucker format is: core and bases as parameters, and a matrix to those who move it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dynarank import cost, linalg, tucker
from dynarank.factors import FactorPair, LowRankFactors
from dynarank.layers._factored import AbstractFactoredLayer, ModeChange, ModeSpectrum, Point
from dynarank.layers._resize import check_resizable, refusal, resize_
from dynarank.tucker import TuckerFactors

MODES = ("out", "in", "height", "width")


class AbstractTuckerLayer(AbstractFactoredLayer, ABC):
    """A layer whose weight ``(out, in, kh, kw)`` is ``core x_1 U_1 x_2 U_2 (x_3 U_3 x_4 U_4)``.

    The parameters are ordinary, with true gradients; slices beyond the ranks are zero and stay zero under every
    gradient step. To an integrator the layer is the matrix ``(out, in * kh * kw)`` of rank ``r_out`` whose right factor
    lies in the other bases: its gradient is projected there, and where a step leads is brought back by one QR a mode.

    Reference:
        Zangrando, Schotthöfer, Ceruti, Kusch, Tudisco, "Geometry-aware training of factorized layers in tensor Tucker
        format", https://arxiv.org/abs/2305.19059: each mode is a matrix factorisation with the other modes frozen. We
        move the mode of outputs as any matrix, and let the others follow by the retraction.
    """

    factor_names = ("core", "out_basis", "in_basis", "height_basis", "width_basis")
    core: nn.Parameter
    out_basis: nn.Parameter
    in_basis: nn.Parameter
    height_basis: nn.Parameter | None
    width_basis: nn.Parameter | None

    def _allocate(self, ranks: Sequence[int], *, rank_multiple: int, device: Any, dtype: Any) -> None:
        if len(ranks) not in (2, 4):
            raise ValueError(f"ranks must be (out, in) or (out, in, height, width), got {tuple(ranks)}.")
        if rank_multiple < 1:
            raise ValueError(f"rank_multiple must be at least 1, got {rank_multiple}.")
        self.rank_multiple = rank_multiple
        self._ranks = (*ranks, *[None] * (4 - len(ranks)))
        tucker.check_ranks(self.weight_shape, self._ranks)
        kind = {"device": device, "dtype": dtype}
        core = self._stored(self._ranks)
        self.core = nn.Parameter(torch.zeros(core, **kind))
        for name, rank, *shape in zip(MODES, self._ranks, core, self.weight_shape, strict=True):
            parameter = None if rank is None else nn.Parameter(torch.zeros(shape, **kind))
            self.register_parameter(f"{name}_basis", parameter)

    @property
    @abstractmethod
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the dense twin's weight, ``(out_channels, in_channels, kh, kw)``."""

    @property
    def ranks(self) -> tuple[int | None, ...]:
        """Rank along each mode, out, in, height, width; None where the mode is not factored."""
        return self._ranks

    # --- the weight ----------------------------------------------------------------------------------------------

    def tucker_point(self, *, detached: bool = True) -> TuckerFactors:
        """Return the factors in use as they are stored, without copying; with their gradients if not ``detached``."""
        cut = self._cut()
        core, *held = [p.detach() if detached and p is not None else p for p in (self.core, *self._bases())]
        assert core is not None
        bases = tuple(None if B is None else B[c].mT for B, c in zip(held, cut, strict=True))
        return TuckerFactors(core[cut], bases)

    def tucker_gradient(self) -> TuckerFactors | None:
        """Return the gradients of core and bases, or None where the layer took no part in the backward pass."""
        gradients = [p.grad for p in self._factors()]
        if all(g is None for g in gradients):
            return None
        if any(g is None for g in gradients):
            raise RuntimeError("core and bases of a Tucker layer must all be trainable or all frozen; one has no grad.")
        cut = self._cut()
        core = self.core.grad
        assert core is not None
        bases = zip(self._bases(), cut, strict=True)
        return TuckerFactors(core[cut], tuple(None if B is None else B.grad[c].mT for B, c in bases))  # type: ignore[index]

    def factors(self) -> TuckerFactors:
        """Return the point in the HOSVD gauge, whatever the gauge it is stored in."""
        return tucker.read(self.tucker_point())

    @torch.no_grad()
    def set_factors(self, point: TuckerFactors, *, resize: bool = True) -> None:
        """Set the weight: the only way a layer changes.

        Within the capacity the parameters are written in place. Beyond it their shape changes; all keep their identity.

        Args:
            point: Factors of a weight of this shape, in any gauge, with the same modes factored.
            resize: Whether the capacity follows the ranks. If not, and the ranks fit, spare slices stay and are zeroed.

        Raises:
            ValueError: The shapes do not fit the layer.
            RuntimeError: A shape must change, but something else still refers to a parameter. Nothing was changed.
        """
        factored = [rank is None for rank in point.ranks] == [rank is None for rank in self.ranks]
        if point.shape != self.weight_shape or not factored:
            raise ValueError(
                f"factors must be of a weight of shape {self.weight_shape} with ranks like {self.ranks}, "
                f"got shape {point.shape} with ranks {point.ranks}."
            )
        tucker.check_ranks(self.weight_shape, point.ranks)
        too_small = any(size > held for size, held in zip(point.core.shape, self.core.shape, strict=True))
        if too_small or (resize and not self._holds(point.ranks)):
            self._resize(self._stored(point.ranks))
        self._ranks = point.ranks
        cut = self._cut()
        _overwrite(self.core, point.core, cut)
        for parameter, basis, c in zip(self._bases(), point.bases, cut, strict=True):
            if parameter is not None and basis is not None:
                _overwrite(parameter, basis.mT, (c,))

    def set_weight_(self, weight: Tensor, *, ranks: Sequence[int | None] | None = None) -> None:
        """Set the factors to the truncated HOSVD of a dense weight, keeping the ranks unless others are given."""
        self.set_factors(tucker.from_dense(weight.detach(), ranks=self.ranks if ranks is None else tuple(ranks)))

    @torch.no_grad()
    def randomise_(self, ranks: Sequence[int]) -> None:
        """Take random factors with these ranks."""
        core = torch.randn(self._whole(ranks), dtype=self.core.dtype, device=self.core.device)
        drawn = [
            None if r is None else torch.randn(n, k).to(core)
            for n, k, r in zip(self.weight_shape, core.shape, self.ranks, strict=True)
        ]
        bases = tuple(None if basis is None else linalg.orthonormalise(basis) for basis in drawn)
        self.set_factors(TuckerFactors(core / prod(self.weight_shape[1:]) ** 0.5, bases))

    @torch.no_grad()
    def set_capacities(self, stored: Sequence[int]) -> None:
        """Store cores of this shape, at least the ranks; the weight stays as it is."""
        point = self.tucker_point()
        point = TuckerFactors(point.core.clone(), tuple(None if U is None else U.clone() for U in point.bases))
        self._resize(tuple(stored))
        self.set_factors(point, resize=False)

    def fits(self, rank: int, modes: Mapping[str, ModeChange] | None = None) -> bool:
        """Whether the layer can take these ranks without a change of shape."""
        wanted = dict(zip(MODES, self.ranks, strict=True)) | {"out": rank}
        wanted |= {mode: change.rank + change.candidates for mode, change in (modes or {}).items()}
        return self._holds(tuple(wanted.values()))

    def _holds(self, ranks: tucker.Ranks) -> bool:
        return tuple(self.core.shape) == self._stored(ranks)

    def resize_refusal(self) -> str | None:
        """Return why the factors cannot change their shape now, or None."""
        return next((why for p in self._factors() if (why := refusal(p)) is not None), None)

    def _bases(self) -> list[nn.Parameter | None]:
        return [self.out_basis, self.in_basis, self.height_basis, self.width_basis]

    def _factors(self) -> list[nn.Parameter]:
        return [self.core, *(basis for basis in self._bases() if basis is not None)]

    def _cut(self) -> tuple[slice, ...]:
        return tuple(slice(rank) for rank in self.ranks)

    def _stored(self, ranks: tucker.Ranks) -> tuple[int, ...]:
        """Return the shape of the core for ``ranks``: the next ``rank_multiple``, at most the size of the mode."""
        pairs = zip(self.weight_shape, ranks, strict=True)
        return tuple(n if rank is None else min(cost.round_up(rank, self.rank_multiple), n) for n, rank in pairs)

    def _resize(self, core: tuple[int, ...]) -> None:
        shapes = [core, *zip(core, self.weight_shape, strict=True)]
        pairs = zip([self.core, *self._bases()], shapes, strict=True)
        changes = [(p, shape) for p, shape in pairs if p is not None and p.shape != shape]
        for parameter, shape in changes:  # all or none
            check_resizable(parameter, shape)
        for parameter, shape in changes:
            resize_(parameter, shape)

    # --- as a matrix of outputs by everything else, moved by any integrator of pairs ----------------------------------

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """``(out, in * kh * kw)``."""
        return self.weight_shape[0], prod(self.weight_shape[1:])

    @property
    def rank(self) -> int:
        """Rank of outputs."""
        return self._ranks[0]  # type: ignore[return-value]

    @property
    def capacity(self) -> int:
        """Outputs of the core that are stored."""
        return self.core.shape[0]

    @property
    def all_ranks(self) -> tuple[int, ...]:
        """Ranks of the factored modes: of outputs, of inputs, of height and width."""
        return tuple(rank for rank in self.ranks if rank is not None)

    @property
    def all_capacities(self) -> tuple[int, ...]:
        """Directions stored along the factored modes."""
        return tuple(len(B) for B in self._bases() if B is not None)

    @property
    def form(self) -> Literal["pair"]:
        """Always a pair."""
        return "pair"

    @property
    def max_rank(self) -> int:
        """Largest rank of outputs with the other ranks as they are."""
        return min(self.weight_shape[0], prod(self.tucker_point().core.shape[1:]))

    def point(self) -> FactorPair:
        """Return ``W (out, in * kh * kw) = A^T B``, in the balanced gauge if the factors are in theirs."""
        point = self._wide_point()
        root = self._roots(point.core)
        core = point.core / root[:, None, None, None]
        B = tucker.multiply(core, [None, *point.bases[1:]]).flatten(1)
        return FactorPair((root[:, None] * _basis(point, 0).mT).contiguous(), B)

    def point_gradient(self) -> FactorPair | None:
        """Return the gradients of the pair, that of ``B`` projected on what the layer can hold to first order."""
        gradient = self.tucker_gradient()
        if gradient is None:
            return None
        point = self._wide_point()
        root = self._roots(point.core)
        right = TuckerFactors(point.core, (None, *point.bases[1:]))  # the gradient of this tensor is A G / root
        found = TuckerFactors(gradient.core, (None, *gradient.bases[1:]))
        at = right
        if not all(_is_orthonormal(U) for _, U in right.modes()):
            at = tucker.read(right)
            found = tucker.turn_gradient(found, right, at)
        slope = tucker.dense_tangent(at, tucker.project_gradient(at, found)).flatten(1)
        return FactorPair(linalg.widen(_basis(gradient, 0)).mT / root[:, None], root[:, None] * slope)

    @torch.no_grad()
    def move_to(self, point: Point) -> FactorPair:
        """Go to a pair near by: its right factor is projected on bases found by one QR for each of the other modes."""
        return self._stand(self._retracted(point), resize=False)

    @torch.no_grad()
    def change_ranks_to(
        self, point: Point, modes: Mapping[str, ModeChange], *, resize: bool, towards: Any
    ) -> FactorPair:
        """Go to a pair of another rank, with other ranks in other modes: cut first, then grown at the floor."""
        at = self._retracted(point)
        ranks = list(at.ranks)
        for mode, change in modes.items():
            ranks[MODES.index(mode)] = change.rank
        ranks = tucker.admissible(at.shape, ranks)
        at = tucker.truncate(at, ranks=ranks)
        columns: list[Tensor | None] = [None] * 4
        for mode, change in modes.items():
            place = MODES.index(mode)
            columns[place] = _new_directions(at, place, change.candidates, None if towards is None else towards[1])
        at = tucker.to_gauge(tucker.augment(at, tuple(columns), floor=tucker.FLOOR))
        return self._stand(at, resize=resize)

    @property
    def mode_names(self) -> tuple[str, ...]:
        """The factored modes besides the outputs."""
        return tuple(mode for mode, rank in zip(MODES[1:], self.ranks[1:], strict=True) if rank is not None)

    def modes(self) -> dict[str, ModeSpectrum]:
        """Return what a rank policy sees of the other modes."""
        at = self.factors()
        found = {}
        for place in range(1, 4):
            if self.ranks[place] is not None:
                n, size = self.weight_shape[place], prod(self.weight_shape)
                sigma = linalg.row_norms(tucker.unfold(at.core, place))
                found[MODES[place]] = ModeSpectrum(sigma, (n, size // n))
        return found

    def prices(self, ranks: Sequence[int]) -> tuple[float, ...]:
        """Return what a direction of each mode takes: its row of the basis and its share of the core."""
        sizes = [n for n, r in zip(self.weight_shape, self.ranks, strict=True) if r is not None]
        core = prod(self._whole(ranks)) / len(sizes)
        return tuple(n + core / rank for n, rank in zip(sizes, ranks, strict=True))

    def deployed_parameters(self) -> int:
        """Return the entries of core and bases, or of the dense weight where that is smaller or equal."""
        point = self.tucker_point()
        return min(point.core.numel() + sum(U.numel() for _, U in point.modes()), prod(self.weight_shape))

    def _whole(self, ranks: Sequence[int]) -> list[int]:
        """Return the shape of a core with these ranks of the factored modes."""
        given = iter(ranks)
        return [n if held is None else next(given) for n, held in zip(self.weight_shape, self.ranks, strict=True)]

    def _wide_point(self) -> TuckerFactors:
        point = self.tucker_point()
        bases = tuple(None if U is None else linalg.widen(U) for U in point.bases)
        return TuckerFactors(linalg.widen(point.core), bases)

    def _roots(self, core: Tensor) -> Tensor:
        norms = linalg.row_norms(core.flatten(1))
        return norms.clamp_min(torch.finfo(norms.dtype).tiny).sqrt()

    def _retracted(self, point: Point) -> TuckerFactors:
        if isinstance(point, LowRankFactors):
            raise TypeError("a Tucker layer has no core form; choose an integrator that stays in the pair form.")
        here = self._wide_point()
        U, R = torch.linalg.qr(linalg.widen(point.A).mT)
        right = R @ linalg.widen(point.B)  # (r, n)
        tensor = right.reshape(-1, *self.weight_shape[1:])
        known = TuckerFactors(here.core, (None, *here.bases[1:]))
        bases: list[Tensor | None] = [U, None, None, None]
        turns = [None if B is None else B.mT for B in known.bases]
        for place, basis in known.modes():
            small = tucker.unfold(tucker.multiply(tensor, turns, skip=place), place)  # (n, r k)
            bases[place] = linalg.orthonormalise(_leading(small, basis.shape[1], basis))
        core = tucker.multiply(tensor, [None, *(None if B is None else B.mT for B in bases[1:])])
        return tucker.to_gauge(TuckerFactors(core, tuple(bases)))

    def _stand(self, at: TuckerFactors, *, resize: bool) -> FactorPair:
        self.set_factors(at, resize=resize)
        root = self._roots(at.core)
        B = tucker.multiply(at.core / root[:, None, None, None], [None, *at.bases[1:]]).flatten(1)
        return FactorPair((root[:, None] * _basis(at, 0).mT).contiguous(), B)

    # --- state dict ----------------------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Take the ranks of what is loaded; a dense ``weight`` becomes its truncated HOSVD."""
        weight = state_dict.get(prefix + "weight")
        if weight is not None and weight.shape == self.weight_shape:
            del state_dict[prefix + "weight"]
            self.set_weight_(weight.to(self.core.device))
            own = [("core", self.core), *zip((f"{mode}_basis" for mode in MODES), self._bases(), strict=True)]
            state_dict.update({prefix + name: p.detach().clone() for name, p in own if p is not None})
        with torch.no_grad():
            self._resize_like(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._ranks = tuple(None if B is None else _rows_in_use(B) for B in self._bases())

    def _resize_like(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Take the capacity of what is about to be loaded, if its shapes fit the layer."""
        core = state_dict.get(prefix + "core")
        if core is None or core.dim() != 4:
            return
        triples = zip(self.ranks, self.weight_shape, core.shape, strict=True)
        if all(1 <= stored <= size and (held is not None or stored == size) for held, size, stored in triples):
            self._resize(tuple(core.shape))


def _basis(point: TuckerFactors, place: int) -> Tensor:
    basis = point.bases[place]
    assert basis is not None
    return basis


def _is_orthonormal(U: Tensor) -> bool:
    gram = U.mT @ U
    gram.diagonal().sub_(1)
    return bool(gram.abs().max() < 1e-4)


def _leading(small: Tensor, count: int, basis: Tensor) -> Tensor:
    """Return ``count`` columns that span what ``small`` is near ``basis``: one step of the power method."""
    return small @ (small.mT @ basis)


def _new_directions(at: TuckerFactors, place: int, count: int, towards: Tensor | None) -> Tensor | None:
    """Return orthonormal directions outside a basis: those a momentum has most of, then others."""
    U = at.bases[place]
    assert U is not None
    if not count:
        return None
    wanted = U.new_zeros(len(U), count)
    if towards is not None:
        tensor = towards.mT.reshape(-1, *at.shape[1:])
        outside = tucker.unfold(tensor, place)
        outside = outside - U @ (U.mT @ outside)
        wanted = linalg.svd(outside)[0][:, :count]
        wanted = torch.nn.functional.pad(wanted, (0, count - wanted.shape[1]))
    return linalg.complement(U, wanted, count)


def _overwrite(parameter: nn.Parameter, values: Tensor, cut: tuple[slice, ...]) -> None:
    """Set the leading entries of a parameter and zero the others; the values may be a view of it."""
    values = values.to(parameter, copy=True)
    parameter.zero_()
    parameter[cut] = values


def _rows_in_use(basis: Tensor) -> int:
    """Return the last row that is not zero (at least 1)."""
    if basis.is_meta:
        return len(basis)
    used = (basis != 0).any(dim=1)
    return max(1, int(torch.where(used, torch.arange(1, len(used) + 1, device=used.device), 0).max()))
