"""The low-rank twin of ``nn.Conv2d`` as a Tucker tensor: 1x1 to few channels, a small kernel, 1x1 back."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynarank import linalg, tucker
from dynarank.layers._conv import AbstractConvTwin, _mix_channels
from dynarank.layers._tucker import AbstractTuckerLayer
from dynarank.tucker import TuckerFactors


class LowRankTuckerConv2d(AbstractTuckerLayer):
    """A convolution whose weight ``(out, in, kh, kw)`` has low multilinear rank: ``W = C x_1 U_1 x_2 U_2 (x_3 x_4)``.

    The parameters are ordinary, with true gradients: the ``core``, and one rank-first basis for each factored mode,
    ``out_basis``, ``in_basis`` and, with four ranks, ``height_basis`` and ``width_basis``. Slices beyond the ranks are
    zero and stay zero under every gradient step. Factors are written in the HOSVD gauge: bases with orthonormal rows,
    the core carries the weight. Trained by a plain optimizer, they are plain Tucker factors. ``LowRankOptimizer`` moves
    them with any integrator of pairs, and a rank policy sees every mode: ``rank_policy="relative_tail"`` is the
    truncation of each mode to a tolerance of the first reference. ``factorize_(model, conv_form="tucker")`` makes them.

    Args and shapes are those of ``nn.Conv2d``; grouped convolutions are refused. Further:

    Args:
        ranks: Ranks of outputs and inputs, ``(r_out, r_in)``, or of all four modes ``(r_out, r_in, r_h, r_w)``. None
            is larger than the size of its mode or the product of the others.
        rank_multiple: Store channels in multiples of this many; those beyond the rank are zero.

    Shape:
        ``core (c_out, c_in, kh, kw)``, ``out_basis (c_out, out)``, ``in_basis (c_in, in)`` with capacities ``c``.

    Raises:
        ValueError: ``ranks`` are out of range, or ``groups`` is not 1.

    Example:
        >>> layer = LowRankTuckerConv2d(6, 8, 3, padding=1, ranks=(4, 2))
        >>> tuple(layer(torch.ones(2, 6, 5, 5)).shape), tuple(layer.core.shape), tuple(layer.in_basis.shape)
        ((2, 8, 5, 5), (4, 2, 3, 3), (2, 6))

    Reference:
        Zangrando, Schotthöfer, Ceruti, Kusch, Tudisco, "Geometry-aware training of factorized layers in tensor Tucker
        format", https://arxiv.org/abs/2305.19059 (all modes); Kim et al., "Compression of deep convolutional neural
        networks for fast and low power mobile applications", ICLR 2016, https://arxiv.org/abs/1511.06530 (channels).
    """

    dense_type = nn.Conv2d
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        *,
        ranks: Sequence[int],
        rank_multiple: int = 1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if groups != 1:
            raise ValueError(
                f"{type(self).__name__} needs groups = 1, got {groups}: the factors of one tensor would couple the "
                "groups. Keep a grouped convolution dense."
            )
        # The dense twin checks the options and spells them out; on the meta device it costs nothing.
        twin = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, 1, bias, padding_mode, device="meta"
        )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, 1
        self.kernel_size, self.stride, self.dilation = twin.kernel_size, twin.stride, twin.dilation
        self.padding, self.padding_mode = twin.padding, padding_mode
        self._edges = list(twin._reversed_padding_repeated_twice)  # as F.pad takes them: last dimension first
        self._description = twin.extra_repr()
        self._allocate(ranks, rank_multiple=rank_multiple, device=device, dtype=dtype)
        empty = torch.zeros(out_channels, device=device, dtype=dtype)
        self.register_parameter("bias", nn.Parameter(empty) if bias else None)
        self.reset_parameters()

    # --- what the layer is ---------------------------------------------------------------------------------------

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the dense twin's weight, ``(out_channels, in_channels, kh, kw)``."""
        return (self.out_channels, self.in_channels, *self.kernel_size)

    @classmethod
    def dense_options(cls, dense: Any) -> dict[str, Any]:
        """Return the options that this layer shares with its dense twin."""
        return AbstractConvTwin.dense_options(dense)

    @classmethod
    def smallest_of(cls, dense: nn.Conv2d) -> "LowRankTuckerConv2d":
        """Return the twin of a dense convolution with ranks 1 of outputs and inputs."""
        return cls.from_dense(dense, ranks=(1, 1))

    @classmethod
    def from_dense(cls, dense: nn.Conv2d, *, ranks: Sequence[int], rank_multiple: int = 1) -> "LowRankTuckerConv2d":
        """Return the low-rank twin of ``dense``: the truncated HOSVD of its weight, and its own bias parameter.

        The global generator is not touched. A weight on the meta device gives factors on the meta device.
        """
        options: dict[str, Any] = {**cls.dense_options(dense), "bias": dense.bias is not None}
        layer = cls(**options, ranks=ranks, rank_multiple=rank_multiple, device="meta", dtype=dense.weight.dtype)
        layer.train(dense.training)
        if not dense.weight.is_meta:
            layer.to_empty(device=dense.weight.device)
            layer.set_weight_(dense.weight)
        layer.requires_grad_(dense.weight.requires_grad)
        layer.bias = dense.bias  # type: ignore[assignment]
        return layer

    def dense_twin(self, device: Any = None) -> nn.Conv2d:
        """Return a freshly initialised dense convolution with the same options, on the same device by default."""
        device = device or self.core.device
        options: dict[str, Any] = {**self.dense_options(self), "bias": self.bias is not None}
        return nn.Conv2d(**options, device=device, dtype=self.core.dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start from the truncated HOSVD of a freshly initialised dense twin, drawn as ``torch.nn`` draws it."""
        if self.core.is_meta:
            return
        twin = self.dense_twin()
        self.set_weight_(twin.weight)
        if self.bias is not None and twin.bias is not None:
            self.bias.copy_(twin.bias)

    @torch.no_grad()
    def to_dense(self) -> nn.Conv2d:
        """Return the dense layer: ``W`` multiplied out in at least float32, and the same bias parameter."""
        point = self.tucker_point()
        wide = TuckerFactors(linalg.widen(point.core), tuple(U if U is None else linalg.widen(U) for U in point.bases))
        return self._filled(self.dense_twin("meta"), wide.to_dense(), self.bias)

    @torch.no_grad()
    def to_plain(self) -> nn.Sequential:
        """Return three plain convolutions that compute the same function, the last with the same bias parameter."""
        point = self.tucker_point()
        outwards, inwards, *spatial = point.bases
        assert outwards is not None
        assert inwards is not None
        (r_out, r_in), kind = point.core.shape[:2], {"device": "meta", "dtype": self.core.dtype}
        between = nn.Conv2d(
            **self.dense_options(self) | {"in_channels": r_in, "out_channels": r_out}, bias=False, **kind
        )
        return nn.Sequential(
            self._filled(nn.Conv2d(self.in_channels, r_in, 1, bias=False, **kind), inwards.mT[..., None, None], None),
            self._filled(between, tucker.multiply(point.core, [None, None, *spatial]), None),
            self._filled(nn.Conv2d(r_out, self.out_channels, 1, **kind), outwards[..., None, None], self.bias),
        ).train(self.training)

    def _filled(self, module: nn.Conv2d, weight: Tensor, bias: nn.Parameter | None) -> nn.Conv2d:
        weight = weight.to(self.core.dtype).clone(memory_format=torch.contiguous_format)
        module.weight = nn.Parameter(weight, requires_grad=self.core.requires_grad)
        module.bias = bias
        return module.train(self.training)

    # --- forward -------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of ``x`` with ``W``; shapes as in ``nn.Conv2d``, batched or not."""
        if self._multiplies_out():
            return self._convolve(x, self._dense_weight(), self.bias)
        z = _mix_channels(x, self.in_basis, None, 2)  # (N, r_in, h, w); every padding commutes with it
        z = self._convolve(z, self._kernel(), None)
        return _mix_channels(z, self.out_basis.mT, self.bias, 2)

    def _multiplies_out(self) -> bool:
        """Whether the forward pass builds ``W``: where the three layers hold as many numbers, that is cheaper."""
        factors = self.core.numel() + self.out_basis.numel() + self.in_basis.numel()
        return factors >= self.out_channels * self.in_channels * self.kernel_size[0] * self.kernel_size[1]

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._edges, mode=self.padding_mode), 0
        return F.conv2d(x, weight, bias, self.stride, padding, self.dilation)  # type: ignore[arg-type]

    def _kernel(self) -> Tensor:
        """Return the kernel between the few channels, ``(c_out, c_in, kh, kw)``."""
        kernel = self.core
        for basis, equation in ((self.height_basis, "oihw,hk->oikw"), (self.width_basis, "oihw,wk->oihk")):
            kernel = kernel if basis is None else torch.einsum(equation, kernel, basis)
        return kernel

    def _dense_weight(self) -> Tensor:
        return torch.einsum("rshw,ro,si->oihw", self._kernel(), self.out_basis, self.in_basis)

    def extra_repr(self) -> str:
        """Shape and ranks, as printed inside the model."""
        spare = f", capacities={self.all_capacities}" if self.all_capacities != self.all_ranks else ""
        return f"{self._description}, ranks={self.all_ranks}{spare}"
