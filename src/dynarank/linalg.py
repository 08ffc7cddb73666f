"""Linear algebra on plain tensors: safe SVD and QR, spectra, polar factors. Leading dimensions are batches.

Everything is computed in at least float32, whatever the dtype of the input, and returned contiguous.
"""

from contextlib import suppress
from functools import cache, reduce

import torch
from torch import Tensor

LARGE = 256  # rows from which a product in bfloat16 is worth the conversions
LONG = 1 << 16  # entries from which iterating on the Gram matrix, which is less work, is worth the digits it loses
QUINTIC = (3.4445, -4.7750, 2.0315)  # coefficients of Newton-Schulz for orthogonalisation
WELL_CONDITIONED = 0.5  # least pivot of unit columns at which a Gram matrix loses less than a digit


def widen(matrix: Tensor) -> Tensor:
    """Return ``matrix`` in at least float32; QR and SVD do not exist below that."""
    return matrix if matrix.dtype in (torch.float32, torch.float64) else matrix.float()


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin singular value decomposition ``U, sigma, V`` with ``matrix = U diag(sigma) V^T``.

    The second factor is ``V`` itself, not its transpose. When the driver does not converge, the decomposition is
    repeated in float64, then from the eigenvectors of the Gram matrix.

    Shape:
        ``(m, n)`` gives ``U (m, k)``, ``sigma (k,)`` descending, ``V (n, k)`` with ``k = min(m, n)``.

    Raises:
        ValueError: The matrix holds NaN or infinity.

    Example:
        >>> U, sigma, V = svd(torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]]))
        >>> sigma.tolist(), tuple(U.shape), tuple(V.shape)
        ([4.0, 3.0], (3, 2), (2, 2))
    """
    matrix = widen(matrix)
    for attempt in (_direct_svd, _double_svd, _gram_svd):
        with suppress(torch.linalg.LinAlgError):
            U, sigma, V = attempt(matrix)
            if bool(torch.isfinite(sigma).all()):  # infinite entries raise or give NaN, as the driver likes
                return U, sigma, V
    raise ValueError(f"svd needs finite entries, got NaN or infinity in a matrix of shape {tuple(matrix.shape)}.")


def _direct_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    U, sigma, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U.contiguous(), sigma, Vh.mT.contiguous()


def _double_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    U, sigma, V = _direct_svd(matrix.double())
    return U.to(matrix.dtype), sigma.to(matrix.dtype), V.to(matrix.dtype)


def _gram_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The last resort: exact to 1e-8 of the largest singular value, and orthonormal to rounding."""
    if matrix.shape[-2] < matrix.shape[-1]:
        V, sigma, U = _gram_svd(matrix.mT)
        return U, sigma, V
    double = matrix.double()
    peak = _peak(double, dim=(-2, -1))  # the squares in the Gram matrix must not overflow
    _, V = torch.linalg.eigh((double / peak).mT @ (double / peak))
    U, R = torch.linalg.qr(double @ V.flip(-1))  # columns by falling size: R is close to diagonal
    sigma, order = R.diagonal(dim1=-2, dim2=-1).abs().sort(dim=-1, descending=True)  # falling, but for rounding
    V = V.flip(-1) * torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).unsqueeze(-2)
    U, V = (torch.take_along_dim(basis, order.unsqueeze(-2), dim=-1) for basis in (U, V))
    return U.to(matrix.dtype).contiguous(), sigma.to(matrix.dtype), V.to(matrix.dtype).contiguous()


def _peak(matrix: Tensor, *, dim: int | tuple[int, ...]) -> Tensor:
    """Return the largest entry by size, and never 0: what to divide by before squaring."""
    return matrix.abs().amax(dim=dim, keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)


def orthonormalise(matrix: Tensor) -> Tensor:
    """Return ``Q`` with orthonormal columns whose span contains the columns of ``matrix``.

    Rank-deficient and nearly dependent columns are completed by arbitrary orthonormal ones, as Householder's QR
    does by itself. There may be no more columns than rows.

    Example:
        >>> Q = orthonormalise(torch.ones(5, 2))
        >>> bool(torch.allclose(Q.T @ Q, torch.eye(2), atol=1e-6))
        True
    """
    Q, _ = torch.linalg.qr(widen(matrix))
    return Q.contiguous()


def gram_qr(matrix: Tensor, *, damping: float = 0.0) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return ``unit, T, R`` with orthonormal ``Q = unit T`` and ``matrix = Q R``, or None where that is inexact.

    ``unit`` is the matrix with columns of length 1. Its Gram matrix is a product in the precision of the matrix, and
    the Cholesky factor of that ``r x r`` matrix is taken in float64. ``Q`` is not formed: what it is multiplied by can
    be multiplied by ``T`` first.

    Args:
        matrix: Columns ``(m, r)``.
        damping: What is added to the diagonal of the Gram matrix of unit columns. Above 0, columns that nearly depend
            on others give columns of ``Q`` shorter than 1, and the result is never None for that.

    Shape:
        ``unit (m, r)``, ``T (r, r)``, ``R (r, r)`` upper triangular.
    """
    matrix = widen(matrix)
    lengths = row_norms(matrix.mT).clamp_min(torch.finfo(matrix.dtype).tiny).unsqueeze(-2)  # (1, r)
    unit = matrix / lengths
    gram = (unit.mT @ unit).double()
    gram.diagonal(dim1=-2, dim2=-1).add_(damping)
    L, failed = torch.linalg.cholesky_ex(gram)
    if bool(failed.any()) or (damping == 0 and float(L.diagonal(dim1=-2, dim2=-1).min()) < WELL_CONDITIONED):
        return None
    identity = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device).expand_as(L)
    T = torch.linalg.solve_triangular(L, identity, upper=False).mT
    return unit, T.to(matrix), (L.mT * lengths).to(matrix)


def complement(basis: Tensor, matrix: Tensor, count: int) -> Tensor:
    """Return at most ``count`` orthonormal columns orthogonal to ``basis``, along ``matrix`` as far as it reaches.

    Shape:
        ``basis (m, r)``, ``matrix (m, k)`` with any ``k``; the result is ``(m, min(count, k, m - r))``.
    """
    rank, count = basis.shape[-1], min(count, matrix.shape[-1], basis.shape[-2] - basis.shape[-1])
    matrix = widen(matrix)
    columns = matrix[..., :count] / _peak(matrix, dim=(-2, -1))
    # One QR of both: its columns are orthogonal to the basis even where the residual vanishes.
    return orthonormalise(torch.cat([widen(basis), columns], dim=-1))[..., rank:].contiguous()


def row_norms(matrix: Tensor) -> Tensor:
    """Return the Euclidean norm of each row without underflow (a plain float32 norm is 0 below 1e-19).

    Example:
        >>> row_norms(torch.tensor([[3e-25, 4e-25]])).item() > 4.9e-25
        True
    """
    matrix = widen(matrix)
    scale = _peak(matrix, dim=-1)
    return (torch.linalg.vector_norm(matrix / scale, dim=-1, keepdim=True) * scale).squeeze(-1)


def tails(sigma: Tensor) -> Tensor:
    """Return ``tails[r] = ||sigma[r:]||_2`` for ``r = 0 ... len(sigma)``: the error of truncating to rank ``r``.

    Example:
        >>> tails(torch.tensor([4.0, 3.0])).tolist()
        [5.0, 3.0, 0.0]
    """
    sigma = widen(sigma)
    scale = _peak(sigma, dim=-1)
    squares = (sigma / scale).square().flip(-1).cumsum(-1).flip(-1)
    return torch.cat([squares.sqrt() * scale, torch.zeros_like(scale)], dim=-1)


def rank_for_tail(sigma: Tensor, tolerance: float) -> int:
    """Return the smallest rank whose tail ``||sigma[rank:]||_2`` is at most ``tolerance`` (absolute), for one spectrum.

    Example:
        >>> rank_for_tail(torch.tensor([4.0, 3.0, 0.1]), 0.5)
        2
    """
    return int((tails(sigma) > tolerance).sum())


def polar(matrix: Tensor) -> Tensor:
    """Return the orthogonal polar factor ``U V^T`` of ``matrix = U diag(sigma) V^T``, by the SVD.

    Singular values below rounding error of the largest count as zero and stay zero.
    """
    U, sigma, V = svd(matrix)
    floor = sigma[..., :1] * torch.finfo(sigma.dtype).eps * max(matrix.shape[-2:])
    return (U * (sigma > floor).to(U.dtype).unsqueeze(-2)) @ V.mT


def newton_schulz(matrix: Tensor, *, steps: int = 5) -> Tensor:
    """Return an approximate polar factor by an odd quintic iteration: singular values land in about [0.7, 1.2].

    Small singular values rise by a factor of 3.4 a step, so noise at rounding level stays small: what is below a
    thousandth of the largest does not get there in five steps. An all-zero matrix stays zero. Large float32 matrices
    are iterated in bfloat16 where the device multiplies that faster; of other large ones that are long, the small Gram
    matrix is iterated, and multiplies the matrix once at the end.

    Example:
        >>> [round(sigma, 1) for sigma in newton_schulz(torch.diag(torch.tensor([30.0, 1.0]))).diagonal().tolist()]
        [0.7, 1.1]

    Reference:
        Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024,
        https://kellerjordan.github.io/posts/muon
    """
    tall = matrix.shape[-2] > matrix.shape[-1]
    X = widen(matrix.mT if tall else matrix)
    X = X / _peak(X, dim=(-2, -1))  # a plain float32 norm of a small gradient is 0, and dividing by that diverges
    X = X / torch.linalg.matrix_norm(X, keepdim=True).clamp_min(1)  # at least 1 already, unless all is zero
    if X.dtype == torch.float32 and X.shape[-2] >= LARGE and _multiplies_bfloat16_fast(X.device.type):
        X = _iterated(X.bfloat16(), steps)
    elif X.shape[-1] >= 2 * X.shape[-2] and X.numel() >= LONG:
        X = _iterated_by_gram(X, steps)
    else:
        X = _iterated(X, steps)
    return (X.mT if tall else X).to(widen(matrix).dtype).contiguous()


def _iterated(X: Tensor, steps: int) -> Tensor:
    a, b, c = QUINTIC
    for _ in range(steps):
        gram = X @ X.mT
        X = _add_product(X, _add_product(gram, gram, gram, beta=b, alpha=c), X, beta=a)
    return X


def _iterated_by_gram(X: Tensor, steps: int) -> Tensor:
    """Return the same from ``X X^T``: every iterate is a polynomial of it times ``X``."""
    a, b, c = QUINTIC
    gram, turns = X @ X.mT, []
    for _ in range(steps):
        if turns:
            gram = turns[-1] @ gram @ turns[-1]
        turns.append(_add_product(gram, gram, gram, beta=b, alpha=c))
        turns[-1].diagonal(dim1=-2, dim2=-1).add_(a)
    return reduce(torch.matmul, turns) @ X  # they are polynomials of one matrix, in any order


def _add_product(summand: Tensor, left: Tensor, right: Tensor, *, beta: float, alpha: float = 1.0) -> Tensor:
    """Return ``beta summand + alpha left right``, in one operation for matrices."""
    if summand.dim() == 2:
        return torch.addmm(summand, left, right, beta=beta, alpha=alpha)
    return beta * summand + alpha * (left @ right)


@cache
def _multiplies_bfloat16_fast(device: str) -> bool:
    """Whether products in bfloat16 are faster than in float32: units for them, in GPUs and in some processors."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    return device == "cpu" and torch.cpu._is_avx512_bf16_supported()


def random_orthonormal(shape: tuple[int, int], *, generator: torch.Generator, like: Tensor) -> Tensor:
    """Return a Haar-distributed matrix with orthonormal columns, drawn on the CPU so every device agrees."""
    draw = torch.randn(shape, generator=generator, dtype=torch.float64)
    Q = orthonormalise(draw)
    # Householder's QR fixes the sign of each column by its first entries; Haar's measure has no preferred sign.
    Q = Q * (Q * draw).sum(dim=-2).sign()
    return Q.to(device=like.device, dtype=widen(like).dtype)


def turn_between(before: Tensor, after: Tensor) -> Tensor:
    """Return ``T (s, r)`` with ``after = T before`` in least squares; ``before (r, n)``, ``after (s, n)``."""
    before, after = widen(before), widen(after)
    lengths = row_norms(before).clamp_min(torch.finfo(before.dtype).tiny).unsqueeze(-1)
    unit = before / lengths
    L, failed = torch.linalg.cholesky_ex((unit @ unit.mT).double())
    if bool(failed.any()) or float(L.diagonal(dim1=-2, dim2=-1).min()) < WELL_CONDITIONED:
        return (after.double() @ before.double().pinverse()).to(after.dtype)
    return (torch.cholesky_solve((unit @ after.mT).double(), L).mT / lengths.mT).to(after.dtype)
