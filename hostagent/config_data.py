"""The settings of the data daemon, [data]; see hostagent.config."""
# ruff: noqa: RUF009 - `setting` is dataclasses.field with the manual in its metadata: it may stand as a default

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hostagent.config_rule import MIB, UNSET, setting


@dataclass(frozen=True, slots=True)
class Data:
    start: bool = setting(
        True,
        "Whether the agent starts the data daemon. It also runs alone, as `hostagent data`.",
    )
    user: str = setting(
        "",
        "The user that the agent starts it as, which needs no image's permissions.",
        unset="hostagent-data where there is that user, else nobody",
    )
    listen: str = setting(
        "",
        "The address that clients connect to; `::` is all of this host. Empty: the loopback address, or, with a "
        "certificate, all. What leaves this host needs a certificate.",
    )
    port: int = setting(54322, "Its port; 0 takes any, -1 listens on none.", low=-1, high=65535)
    cert: Path = setting(UNSET, "The certificate (PEM, with its chain). Without one clients are served in plain HTTP.")
    key: Path = setting(UNSET, "Its private key (PEM). Both are read anew when the files change, and on SIGHUP.")
    client_ca: Path = setting(UNSET, "Authorities (PEM) of which each client must show a certificate.")
    local_socket: Path = setting(
        UNSET,
        "A unix socket for clients on this host, which OPTIONS names; any user may connect, for a ticket is the right.",
        unset="data.sock in agent.runtime_dir",
        usual="/run/hostagent/data.sock",
    )
    control_socket: Path = setting(
        UNSET,
        "The unix socket on which tickets are added and revoked (mode 0660, api.socket_group).",
        unset="data-control.sock in agent.runtime_dir",
        usual="/run/hostagent/data-control.sock",
    )
    control_port: int = setting(
        -1,
        "The same on a TCP port of the loopback address, where every user of this host may add tickets; -1 is off, 0 "
        "any port.",
        low=-1,
        high=65535,
    )
    cloudstack_socket: Path = setting(
        UNSET, "A unix socket for CloudStack's agent: register, unregister and status, one JSON line each. Empty: off."
    )
    cloudstack_drain: float = setting(
        60.0,
        "Seconds that requests get to end when CloudStack unregisters a transfer; then they are cut.",
        low=0,
        high=3600,
    )
    allow_paths: tuple[str, ...] = setting(
        (), "Folders whose images `file:` tickets may name. The daemon opens them with its user's permissions."
    )
    proxy: tuple[str, ...] = setting(
        (),
        "Other data daemons (HOST, HOST:PORT) that `http:` and `https:` tickets may name: the proxy role.",
        servers=True,
    )
    proxy_ca: Path = setting(UNSET, "Authorities (PEM) for their certificates. Empty: those of the system.")
    proxy_connect_timeout: float = setting(
        10.0, "Seconds until such a daemon must have let a connection in.", low=0.1, high=600
    )
    proxy_timeout: float = setting(
        60.0, "Seconds without progress until such a daemon is given up.", low=0.1, high=3600
    )
    audit: Path = setting(UNSET, "A file that gets a line for each ticket granted, extended and revoked.")
    tickets: int = setting(10000, "Tickets at a time. One more is refused with 429.", low=1, high=1000000)
    ticket_size: int = setting(65536, "Bytes of a ticket, and of the body of a PATCH.", low=1024, high=MIB, size=True)
    max_connections: int = setting(4096, "Clients at a time, each with a thread.", low=1, high=100000)
    max_client_connections: int = setting(
        2048, "Connections of one client: an address, or a user on a unix socket.", low=1, high=100000
    )
    handshake_timeout: float = setting(10.0, "Seconds for a TLS handshake.", low=0.1, high=600)
    header_timeout: float = setting(10.0, "Seconds for a request's head, from its first byte.", low=0.1, high=600)
    idle_timeout: float = setting(
        60.0, "Seconds without progress until a client is cut that has used no ticket yet.", low=0.1, high=3600
    )
    inactivity_timeout: int = setting(60, "The same with a ticket that does not say its own.", low=1, high=86400)
    turn_timeout: float = setting(
        10.0,
        "Seconds that one more reader or writer than max_readers or max_writers waits for its turn.",
        low=0,
        high=600,
    )
    revoke_timeout: float = setting(
        2.0,
        "Seconds until what a revoked ticket runs must have ended; the answer is 409 if it has not.",
        low=0.1,
        high=60,
    )
    keep_expired: float = setting(
        3600.0,
        "Seconds for which a ticket whose time is over can still be extended; then it is revoked.",
        low=0,
        high=864000,
    )
    handover_wait: float = setting(
        60.0, "Seconds for which descriptors that were handed over are kept until their ticket comes.", low=1, high=3600
    )
    expiry_interval: float = setting(0.5, "Seconds between two looks for tickets whose time is over.", low=0.1, high=60)
    stop_timeout: float = setting(10.0, "Seconds that running requests get when the daemon stops.", low=0, high=600)
    nbd_connect_timeout: float = setting(
        10.0, "Seconds until an NBD server must have let a connection in.", low=0.1, high=600
    )
    nbd_connections: int = setting(
        8, "Readers, and writers, of one ticket where the NBD server can have several.", low=1, high=64
    )
    nbd_timeout: float = setting(30.0, "Seconds without progress until an NBD server is given up.", low=0.1, high=3600)
    nbd_flush_timeout: float = setting(
        600.0,
        "Seconds until an NBD server must have flushed: all that it has cached may have to go to a slow disk.",
        low=0.1,
        high=7200,
    )
    rate: int = setting(
        0, "Bytes/s of all tickets together, shared fairly between them; 0 is no limit.", low=0, size=True
    )
    map_timeout: float = setting(
        30.0, "Seconds to find where the bytes of an image lie in its files.", low=0.1, high=600
    )
    map_extents: int = setting(
        1000000,
        "Extents of one image that are kept in memory; one with more is served by NBD.",
        low=1000,
        high=100000000,
    )
    map_hold: float = setting(
        600.0,
        "Seconds for which a transfer keeps writers from the files of an image that it reads directly; what is left "
        "then comes by NBD.",
        low=1,
        high=86400,
    )
