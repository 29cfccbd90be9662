"""Placeholder replaced by the merge."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hostagent.data.backends.base import ImageBackend
from hostagent.data.errors import HttpError

ALGORITHM = "blake2b"
BLOCK_SIZE = 4 << 20
ALGORITHMS = sorted(name for name in hashlib.algorithms_available if not name.startswith("shake_"))


@dataclass(frozen=True)
class Asked:
    algorithm: str
    block_size: int

    def of(
        self, backend: ImageBackend, size: int, check: Callable[[], None], another: Callable[[], ImageBackend] | None
    ) -> dict[str, Any]:
        def new() -> Any:
            return hashlib.blake2b(digest_size=32) if self.algorithm == "blake2b" else hashlib.new(self.algorithm)

        outer = new()
        with backend.open_session() as session:
            for offset in range(0, size, self.block_size):
                check()
                inner = new()
                inner.update(session.read(offset, min(self.block_size, size - offset)))
                outer.update(inner.digest())
        return {"algorithm": self.algorithm, "block_size": self.block_size, "checksum": outer.hexdigest()}


def asked(algorithm: str, block_size: str) -> Asked:
    if algorithm not in ALGORITHMS:
        raise HttpError(400, f"Unsupported value {algorithm[:100]!r} for 'algorithm', expecting one of {ALGORITHMS}")
    if not (block_size.isascii() and block_size.isdigit()):
        raise HttpError(400, f"Invalid block size: {block_size[:100]!r}")
    return Asked(algorithm, int(block_size))
