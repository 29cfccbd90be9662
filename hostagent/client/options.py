"""What a transfer may do, and how long it may wait: every wait and every amount has its bound here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hostagent.sizes import UNLIMITED

MIB = 1 << 20

PIECE = MIB
"""Bytes that go through memory at a time. Measured: 512 KiB to 2 MiB is the plateau."""
REQUEST_MOST = 128 * MIB
"""Bytes of one request at most: what a server does in one step, and what is done again when it fails."""

Resume = Literal["auto", "trust", "never"]


@dataclass(frozen=True, slots=True)
class Tls:
    """`cafile`: PEM file of the authorities that are trusted, besides none; "" is the system's. `certificate` and `key`
    are the client's own, for a server that asks for one."""

    cafile: str = ""
    insecure: bool = False
    certificate: str = ""
    key: str = ""


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds. `silence`: without a byte from or to the server. `retry_for`: without progress, until a transfer is
    given up; `first_contact` is that before anything was ever answered. `retry_wait` doubles up to `retry_wait_max`."""

    connect: float = 10.0
    silence: float = 60.0
    flush: float = 600.0
    checksum: float = 6 * 3600.0
    retry_wait: float = 0.5
    retry_wait_max: float = 15.0
    retry_for: float = 300.0
    first_contact: float = 5.0
    stop: float = 10.0


@dataclass(frozen=True, slots=True)
class Storage:
    """The storage daemon that reads and writes qcow2 images. `user`: as which it runs, when we are root ("": as
    ourselves). `pools`: folders where backing files may lie, besides the folder of the image that names them."""

    binary: str = "qemu-storage-daemon"
    user: str = ""
    pools: tuple[str, ...] = ()
    layers_most: int = 200
    start_timeout: float = 10.0
    answer_timeout: float = 60.0
    stop_timeout: float = 30.0


@dataclass(frozen=True, slots=True)
class Options:
    """`proxy`: another server that serves the same tickets, tried when the URL's own cannot be reached, or with
    `proxy_only` instead. `local`: use the server's unix socket when it is on this host. `bandwidth`: bytes/s.

    `flush_interval`: seconds after which a connection makes durable what went over it, so that no more than that is
    done again. `resume`: auto goes on where it is proven to be the same image, trust wherever the local file is.
    """

    workers: int = 4
    request_size: int = 32 * MIB
    bandwidth: int = UNLIMITED
    tls: Tls = field(default_factory=Tls)
    proxy: str = ""
    proxy_only: bool = False
    local: bool = True
    patience: Patience = field(default_factory=Patience)
    storage: Storage = field(default_factory=Storage)
    flush_interval: float = 10.0
    resume: Resume = "auto"
    journal: str = ""
    restarts: int = 3
    extents_most: int = 4_000_000
    verify: bool = False
    algorithm: str = "blake2b"
    block_size: int = 4 * MIB
