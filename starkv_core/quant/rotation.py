"""Orthogonal matrices of any size with flat entries: they spread what one channel holds over all.

Hadamard matrices where one is known (Sylvester's and Paley's constructions and their products, so
most multiples of 4), else the product of the largest Sylvester factor with a cosine transform.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch


def rotation(size: int) -> torch.Tensor:
    """Orthogonal ``[size, size]``, float64; no entry is above ``sqrt(2 / odd part)`` over the root
    of the rest, and all are ``1 / sqrt(size)`` in magnitude where a Hadamard matrix is known.

    Raises:
        ValueError: a size below 1.
    """
    if size < 1:
        raise ValueError(f"rotation of size {size}: must be 1 or more")
    signs = hadamard(size)
    if signs is not None:
        return signs / math.sqrt(size)
    power = size & -size
    outer = hadamard(power)
    assert outer is not None
    return torch.kron(outer / math.sqrt(power), cosines(size // power))


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def hadamard(size: int) -> torch.Tensor | None:
    """A Hadamard matrix of that size, float64 of 1 and -1, or None where no construction is known.

    Sylvester: ``H(2n) = H(2) x H(n)``. Paley I: size q + 1 for a prime q = 3 mod 4. Paley II: size
    2 (q + 1) for a prime q = 1 mod 4.
    """
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if size == 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if size % 4:
        return None
    half = hadamard(size // 2)
    if half is not None:
        two = hadamard(2)
        assert two is not None
        return torch.kron(two, half)
    if _is_prime(size - 1) and (size - 1) % 4 == 3:
        skew = _bordered(size - 1)
        skew[1:, 0] = -1.0
        return skew + torch.eye(size, dtype=torch.float64)
    if _is_prime(size // 2 - 1) and (size // 2 - 1) % 4 == 1:
        core = _bordered(size // 2 - 1)
        both = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        own = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(core, both) + torch.kron(torch.eye(size // 2, dtype=torch.float64), own)
    return None


def cosines(size: int) -> torch.Tensor:
    """The orthonormal cosine transform (DCT-II), float64 ``[size, size]``."""
    k = torch.arange(size, dtype=torch.float64)
    table = torch.cos(math.pi / size * (k[None, :] + 0.5) * k[:, None]) * math.sqrt(2.0 / size)
    table[0] /= math.sqrt(2.0)
    return table


def _bordered(q: int) -> torch.Tensor:
    """Paley's matrix of quadratic residues mod a prime, bordered by ones: ``[q + 1, q + 1]``."""
    residues = {n * n % q for n in range(1, q)}
    sign = [0.0] + [1.0 if n in residues else -1.0 for n in range(1, q)]
    index = torch.arange(q)
    core = torch.tensor(sign, dtype=torch.float64)[(index[None, :] - index[:, None]) % q]
    bordered = torch.ones(q + 1, q + 1, dtype=torch.float64)
    bordered[0, 0] = 0.0
    bordered[1:, 1:] = core
    return bordered


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))
