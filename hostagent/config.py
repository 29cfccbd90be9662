"""The settings of the agent: their names, defaults, limits and manual.

The dataclasses below are the only list of settings. Each field's default gives its type, and its text is its manual:
`--show-config` and the example file are printed from them. A `Config` that is in force comes from config_text.load,
which also fills the settings whose default depends on the machine or the user.
"""
# ruff: noqa: RUF009 - `setting` is dataclasses.field with the manual in its metadata: it may stand as a default

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from hostagent.config_data import Data
from hostagent.config_dbus import Dbus
from hostagent.config_rule import GIB, MIB, UNSET, Rule, setting

__all__ = ["DEFAULTS", "GIB", "MIB", "SECTIONS", "UNSET", "Config", "Dbus", "Rule", "rules", "setting"]


@dataclass(frozen=True, slots=True)
class Agent:
    state_dir: Path = setting(
        UNSET,
        "What survives a restart: the store (SQLite). On a local file system.",
        unset="for a plain user $XDG_STATE_HOME/hostagent",
        usual="/var/lib/hostagent",
    )
    runtime_dir: Path = setting(
        UNSET,
        "Sockets: the API's, the storage daemons' monitors, NBD. Emptied by a reboot. Socket names have 107 bytes, so "
        "keep it short.",
        unset="for a plain user $XDG_RUNTIME_DIR/hostagent, else /tmp/hostagent-UID",
        usual="/run/hostagent",
    )
    host: str = setting("", "This host's name in events and answers.", unset="the host name")
    stop_timeout: float = setting(
        10.0,
        "Seconds that running requests and step ends get when the agent stops. Storage daemons go on without it.",
        low=0.1,
        high=600,
    )


@dataclass(frozen=True, slots=True)
class Qsd:
    binary: str = setting("qemu-storage-daemon", "The program, a path or a name to look up in PATH.")
    user: str = setting("", "The user that storage daemons and qemu-img run as.", unset="access.hypervisor_user")
    start_timeout: float = setting(10.0, "Seconds until a new storage daemon listens.", low=0.1, high=600)
    stop_timeout: float = setting(
        10.0, "Seconds to flush and end after `quit`. One that does not is unresponsive, not killed.", low=0.1, high=600
    )
    flush_timeout: float = setting(
        120.0,
        "Seconds to make durable all that was written, at the end of a writable export or of a job. It answers nothing "
        "else meanwhile.",
        low=1,
        high=3600,
    )
    unresponsive_kill: float = setting(
        0.0,
        "Seconds after which an unresponsive storage daemon that serves only a job is killed; 0 is never. One with a "
        "writable export is never killed by itself.",
        low=0,
        high=86400,
    )
    open_files: int = setting(4096, "Open files that a storage daemon may have (RLIMIT_NOFILE).", low=64, high=1048576)
    max_connections: int = setting(
        64,
        "NBD connections that the exports of one image take together; `--max-clients` gives an export a limit of its "
        "own.",
        low=1,
        high=10000,
    )
    max_daemons: int = setting(1000, "Storage daemons at a time.", low=1, high=100000)
    probe_interval: float = setting(1.0, "Seconds between two looks at whether they answer.", low=0.1, high=60)


@dataclass(frozen=True, slots=True)
class Qmp:
    connect_timeout: float = setting(5.0, "Seconds to connect to a monitor.", low=0.1, high=600)
    call_timeout: float = setting(
        10.0, "Seconds until a command is answered. After that the storage daemon is unresponsive.", low=0.1, high=600
    )


@dataclass(frozen=True, slots=True)
class Libvirt:
    uri: str = setting(
        "",
        "The libvirt whose domains are looked after. Empty is none. One that is absent is tried again and again, and "
        "holds up nothing. Of another host's nothing is done to files.",
        unset="for a plain user empty",
        usual="qemu:///system",
    )
    qemu_conf: Path = setting(
        Path("/etc/libvirt/qemu.conf"),
        "libvirt's own settings for QEMU. Where they turn dynamic_ownership off, libvirt changes no file's owner, and "
        "none is given back.",
    )
    connect_timeout: float = setting(
        10.0, "Seconds until a connection that is not made is said to hang. It is waited for.", low=0.1, high=600
    )
    call_timeout: float = setting(
        35.0,
        "Seconds until a call is answered; libvirt itself waits up to 30 s for another call on the same domain.",
        low=0.1,
        high=3600,
    )
    keepalive_interval: int = setting(5, "Seconds between two questions whether it lives.", low=1, high=600)
    keepalive_count: int = setting(3, "Questions without an answer until the connection is given up.", low=1, high=100)
    reconnect_wait: float = setting(1.0, "Seconds until a failed connection is tried again.", low=0.1, high=600)
    reconnect_wait_max: float = setting(30.0, "That wait doubles up to this many seconds.", low=0.1, high=3600)
    workers: int = setting(
        8,
        "Calls at a time, each with a connection of its own. A guest whose QEMU hangs keeps one. libvirtd answers some "
        "20 at a time (its max_workers), to all its clients.",
        low=1,
        high=100,
    )
    event_queue: int = setting(
        10000, "Events that wait for the agent; when more come, everything is read anew.", low=10, high=1000000
    )
    xml_size: int = setting(4 * MIB, "Bytes of one domain's description.", low=64 * 1024, high=64 * MIB, size=True)
    refresh: float = setting(
        60.0,
        "Seconds between two looks at which domain uses which file, and at what images keep of a chain that got "
        "shorter while nobody looked, besides those that events start.",
        low=1,
        high=86400,
    )
    sample: float = setting(
        2.0,
        "Seconds between two readings of the cursor of a job on a guest's disk, and between two looks for jobs that "
        "somebody else has started there. libvirt tells of their ends at once.",
        low=0.05,
        high=3600,
    )
    external_jobs: int = setting(
        256, "Jobs of somebody else's that are followed at a time; more are not shown.", low=0, high=100000
    )
    agree_timeout: float = setting(
        5.0,
        "Seconds for libvirt to say of a disk's chain what the image itself says, once a job on it has ended; and "
        "until a chain that lost something without a job is looked at.",
        low=0.1,
        high=600,
    )
    pivot_attempts: int = setting(
        5, "Times that a guest is asked to go over to a copy that is ready, before the copy fails.", low=1, high=1000
    )
    pivot_wait: float = setting(
        0.5, "Seconds between the first two of these. Each wait is twice the one before.", low=0.05, high=600
    )
    file_timeout: float = setting(
        5.0, "Seconds to look at the files of one domain, and for who asks about them.", low=0.1, high=600
    )


@dataclass(frozen=True, slots=True)
class Images:
    pools: tuple[str, ...] = setting(
        ("/var/lib/libvirt/images",),
        "Folders that a backing file may lie in, besides its overlay's own. A header that names a file elsewhere gives "
        "no access to it.",
    )
    max_depth: int = setting(200, "Layers of one backing chain (libvirt's own limit).", low=1, high=200)
    check_timeout: float = setting(300.0, "Seconds for qemu-img check.", low=1, high=86400)
    check_auto_size: int = setting(
        1 * GIB,
        "With `--check auto`, images that have at most this much allocated are checked before a job. The time of a "
        "check grows with the metadata.",
        low=0,
        size=True,
    )
    tool_memory: int = setting(
        1 * GIB, "Memory of one qemu-img (RLIMIT_AS): headers come from guests.", low=64 * MIB, size=True
    )
    tool_cpu: int = setting(300, "Processor seconds of one qemu-img (RLIMIT_CPU).", low=1, high=86400)
    measure_timeout: float = setting(
        20.0,
        "Seconds for qemu-img measure, which says what a copy or a commit needs. Where it takes longer the job begins "
        "with a warning.",
        low=0.1,
        high=3600,
    )
    inspect_timeout: float = setting(10.0, "Seconds to read the headers of a chain.", low=0.1, high=600)
    scan_entries: int = setting(
        100_000,
        "Entries of one folder that are looked through for images that stand on a file, before it is written.",
        low=1,
        high=10_000_000,
    )
    scan_timeout: float = setting(30.0, "Seconds for such a search.", low=0.1, high=3600)
    watch_interval: float = setting(
        30.0,
        "Seconds between two looks at whether a file that is open was cut, deleted or replaced by somebody else.",
        low=0.1,
        high=86400,
    )
    map_output: int = setting(
        64 * MIB, "Bytes that qemu-img map may say of one image; an extent takes some 110.", low=64 * 1024, size=True
    )
    bitmaps: int = setting(1000, "Bitmaps of one image, at most.", low=1, high=10000)
    bitmap_timeout: float = setting(
        30.0,
        "Seconds that a request waits for a change of bitmaps. The change itself goes on, for ending it would spoil "
        "the image's bitmaps; images.tool_cpu bounds it.",
        low=0.1,
        high=3600,
    )
    qemu_img: str = setting("qemu-img", "The program, a path or a name to look up in PATH.")
    network: tuple[str, ...] = setting(
        (),
        "Servers whose NBD exports may be exported by everybody who may use the agent, for they are reached in its "
        "name: HOST, HOST:PORT, the path of a socket, or a folder of sockets. Empty is none. In the environment they "
        "are separated by commas.",
        servers=True,
    )


@dataclass(frozen=True, slots=True)
class Jobs:
    width: int = setting(4, "Jobs that run at the same time; the others wait as `queued`.", low=1, high=1000)
    queue: int = setting(
        1000,
        "Jobs that wait or run, the last tenth of them of who may name any image. One more: `limit`.",
        low=0,
        high=100000,
    )
    group: int = setting(
        16, "Disks of one group, at most; as all are copied at once, never more than `width`.", low=2, high=100
    )
    progress_interval: float = setting(0.5, "Seconds between two readings of the cursor.", low=0.05, high=60)
    abort_timeout: float = setting(
        30.0,
        "Seconds until a cancelled job must have ended. After that `abort --force` may kill its storage daemon; and "
        "the connections of a guest's QEMU to the NBD server that it copies to are cut.",
        low=0.1,
        high=3600,
    )
    start_timeout: float = setting(30.0, "Seconds to start a job, storage daemon included.", low=1, high=3600)
    retention_days: int = setting(14, "Days that a finished job is kept.", low=0, high=3650)
    retention_count: int = setting(10000, "Finished jobs that are kept; the oldest go first.", low=0, high=1000000)
    slice: int = setting(
        64 * MIB,
        "Bytes that one step of an incremental pull moves before it looks up.",
        low=MIB,
        high=16 * GIB,
        size=True,
    )
    requests_in_flight: int = setting(16, "Requests of one incremental pull at a time.", low=1, high=256)
    request_size: int = setting(
        1 * MIB,
        "Bytes of one such request. NBD servers need not take more than 32 MiB.",
        low=4096,
        high=32 * MIB,
        size=True,
    )
    settle_retry: float = setting(
        1.0, "Seconds until an outcome that could not be read is tried again.", low=0.1, high=60
    )
    settle_retry_max: float = setting(30.0, "The retry's wait doubles up to this many seconds.", low=0.1, high=3600)
    end_retries: int = setting(
        3,
        "Times that QEMU is asked again for the end of a copy whose group is decided, each after `settle_retry`. If it "
        "still refuses the pivot, that job fails with `pivot_refused` and keeps its copy, which is whole.",
        low=0,
        high=1000,
    )


@dataclass(frozen=True, slots=True)
class Access:
    hypervisor_user: str = setting(
        "",
        "The user that gets access to images, and for whom `revoked` is tested. Empty is the agent's own user: then "
        "nothing is granted.",
        unset="for a plain user empty",
        usual="libvirt-qemu",
    )
    wait: float = setting(5.0, "Seconds that a finished job's `--wait` waits for its revocation.", low=0, high=600)
    converge_interval: float = setting(
        60.0,
        "Seconds between two comparisons of all files with the ledger, besides those that events start.",
        low=1,
        high=86400,
    )
    probe_timeout: float = setting(2.0, "Seconds to try whether the user can open a file.", low=0.1, high=60)
    converge_timeout: float = setting(10.0, "Seconds to change one file's access list.", low=0.1, high=600)
    shared_filesystems: str = setting(
        "report",
        "NFS, Ceph and their like: `report` never changes access there, because another host's guest may use the file; "
        "`manage` says that this host owns them.",
        choices=("report", "manage"),
    )
    unknown_owner: str = setting(
        "",
        "USER:GROUP, names or numbers, who gets a file that libvirt leaves the hypervisor user's own when no domain "
        "needs it any more and its owner before was not seen. Empty only reports such files.",
        unset="for a plain user empty",
        usual="root:root",
    )
    protected: tuple[str, ...] = setting(
        (), "Files, and folders with all that is in them, whose access is never taken back: shared bases, templates."
    )


@dataclass(frozen=True, slots=True)
class Exports:
    idle_check: float = setting(1.0, "Seconds between two looks for clients and run-out times.", low=0.1, high=60)
    limit: int = setting(2000, "Exports at a time. One more is refused with `limit`.", low=1, high=100000)
    nbd_timeout: float = setting(
        10.0,
        "Seconds for the agent's own NBD calls. Where a guest's QEMU is not let in after twice that by the server that "
        "it is to copy to, its connection is cut: the guest stands still meanwhile.",
        low=0.1,
        high=600,
    )
    merge_timeout: float = setting(
        30.0,
        "Seconds to compare an export's bitmaps of several layers with what these have allocated: some 4 for a million "
        "fragments.",
        low=0.1,
        high=600,
    )
    open_timeout: int = setting(
        5, "Seconds until a network image's server must have let the storage daemon in.", low=1, high=600
    )
    retention_count: int = setting(1000, "Ended exports that are kept; the oldest go first.", low=0, high=1000000)


@dataclass(frozen=True, slots=True)
class Tls:
    listen: str = setting("127.0.0.1", "The address that an export over TCP listens on when it names none.")
    x509_dir: Path = setting(
        UNSET,
        "Certificates of exports with `--tls x509`: ca-cert.pem, server-cert.pem and server-key.pem, as QEMU names "
        "them. The storage daemons' user must be able to read them. Clients must show a certificate of that CA.",
    )
    psk_dir: Path = setting(
        UNSET,
        "Keys of exports with `--tls psk`: keys.psk, with a line USER:HEX for each client (psktool writes it).",
    )
    x509_names: Path = setting(
        UNSET,
        "A file with the distinguished names that may connect, one a line, as QEMU's log shows them; `*` stands for "
        "anything. Without a file it is every client with a certificate of the CA.",
    )


@dataclass(frozen=True, slots=True)
class Api:
    socket: Path = setting(
        UNSET,
        "The unix socket of the API.",
        unset="hostagent.sock in agent.runtime_dir",
        usual="/run/hostagent/hostagent.sock",
    )
    socket_group: str = setting("hostagent", "The group that may use it (mode 0660). A plain user's is 0600.")
    max_body: int = setting(65536, "Bytes of a request's body.", low=1024, high=16 * MIB, size=True)
    max_json_depth: int = setting(16, "How deep a request's JSON may nest.", low=4, high=100)
    body_timeout: float = setting(10.0, "Seconds until a request's body must be here.", low=0.1, high=600)
    max_connections: int = setting(
        256,
        "Requests at a time, and as many of root and the agent's own user, and of those who come by TCP.",
        low=1,
        high=10000,
    )
    wait_limit: float = setting(60.0, "The longest `?wait=`, in seconds.", low=0, high=600)
    list_limit: int = setting(1000, "Objects on one page of a list.", low=1, high=10000)
    sse_heartbeat: float = setting(15.0, "Seconds between comments that keep an event stream alive.", low=0.1, high=600)
    sse_subscribers: int = setting(
        64,
        "Event streams at a time, and as many of root and the agent's own user, and of those who come by TCP.",
        low=0,
        high=10000,
    )
    sse_queue: int = setting(1000, "Events that wait for one slow stream before it loses some.", low=10, high=100000)
    keepalive: int = setting(5, "Seconds that an idle connection is kept.", low=1, high=600)
    listen: tuple[str, ...] = setting(
        (),
        "Addresses (IP:PORT, [IP]:PORT) to serve the API on by TCP, with TLS, to who has a token or a certificate. "
        "Empty is none. In the environment they are separated by commas.",
        words=True,
    )
    tls_certificate: Path = setting(UNSET, "The certificate for that (PEM, with its chain).")
    tls_key: Path = setting(
        UNSET,
        "Its private key (PEM, without a password), where it is not in that file. Both are read anew when they change, "
        "and on SIGHUP; what cannot be used leaves the old ones in force.",
    )
    tls_client_ca: Path = setting(UNSET, "Authorities (PEM) of which clients show a certificate.")
    tls_clients: str = setting(
        "required",
        "Whether each must; `optional` is for those with tokens alone. It matters with tls_client_ca.",
        choices=("required", "optional"),
    )
    certificate_scopes: tuple[str, ...] = setting(
        (),
        "What clients with a certificate may do: NAME=SCOPE, where NAME is CN:…, DNS:…, URI:… or email:… as it stands "
        "in the certificate, and SCOPE read, operate or admin. One without a name of these may do nothing. In the "
        "environment they are separated by commas.",
        words=True,
    )
    tokens_file: Path = setting(
        UNSET,
        "The names, scopes and hashes of tokens, as `hostagent token` writes them.",
        unset="tokens.json in agent.state_dir",
        usual="/var/lib/hostagent/tokens.json",
    )
    tokens: int = setting(1000, "Tokens at a time.", low=0, high=10000)
    plain_loopback: bool = setting(
        False, "Whether `listen` may name loopback addresses without a certificate. Tokens are asked for all the same."
    )
    tcp_connections: int = setting(256, "Connections by TCP at a time.", low=1, high=10000)
    tcp_client_connections: int = setting(
        64, "Connections by TCP of one address (IPv6: of 64 bits of it).", low=1, high=10000
    )
    handshake_timeout: float = setting(10.0, "Seconds for a TLS handshake.", low=0.1, high=600)
    handshake_rate: int = setting(50, "Connections by TCP that are begun in a second.", low=1, high=10000)
    auth_failures: int = setting(
        10,
        "Failed authentications of one address in a minute, those that showed nothing among them; one more gets 429 "
        "instead of 401, and no line in the log.",
        low=1,
        high=10000,
    )
    identity_interval: float = setting(
        1.0,
        "Seconds between two looks whether tokens and certificates have changed, and whether those who are connected "
        "may still be. For an unknown token there is a look at once, and this long it waits for that at most.",
        low=0.1,
        high=60,
    )


@dataclass(frozen=True, slots=True)
class Store:
    busy_timeout: float = setting(5.0, "Seconds to wait for the database's lock.", low=0.1, high=60)
    events_kept: int = setting(100000, "Events that a client may still replay.", low=100, high=10000000)
    prune_interval: float = setting(
        600.0, "Seconds between two looks at what retention no longer keeps.", low=1, high=86400
    )
    prune_rows: int = setting(
        200,
        "Jobs, exports or events that are forgotten at a time; a job's next record waits for so long.",
        low=10,
        high=100000,
    )
    min_free: int = setting(
        16 * MIB, "Bytes that must be free beside the store before new work is taken.", low=0, size=True
    )


@dataclass(frozen=True, slots=True)
class Metrics:
    listen: str = setting(
        "",
        "An address (IP:PORT, as 127.0.0.1:18177) on which GET /metrics is answered, for a Prometheus that cannot use "
        "the API's socket. Empty is none. Every user who reaches it reads the names of guests and the paths of images.",
        address=True,
    )
    beyond_loopback: bool = setting(
        False,
        "Whether that address may be another than this host's own loopback: it has neither encryption nor identities, "
        "so only on a network for management.",
    )
    max_connections: int = setting(16, "Scrapes at a time.", low=1, high=1000)
    max_head: int = setting(8192, "Bytes of a request's head.", low=1024, high=65536, size=True)
    timeout: float = setting(10.0, "Seconds for one scrape, from its connection to its end.", low=0.1, high=600)
    refresh: float = setting(
        15.0,
        "Seconds between two looks at what no event tells of: space beside the store, orphaned storage daemons that "
        "have ended. A scrape looks at nothing.",
        low=0.1,
        high=3600,
    )


@dataclass(frozen=True, slots=True)
class Audit:
    file: Path = setting(
        UNSET,
        "The file that gets a JSON line for each call that changes something: who, what, from where, the result. It is "
        "opened anew on SIGHUP.",
        unset="audit.jsonl in agent.state_dir",
        usual="/var/lib/hostagent/audit.jsonl",
    )
    size: int = setting(
        16 * MIB, "Bytes from which on it becomes FILE.1, and that one FILE.2.", low=4096, high=16 * GIB, size=True
    )
    keep: int = setting(4, "Such older files that are kept.", low=0, high=1000)
    queue: int = setting(
        10000, "Lines that wait for a slow disk; one more is lost, which is counted and logged.", low=1, high=1000000
    )
    refusals: int = setting(
        60,
        "Lines in a minute for calls of one caller that changed nothing: not allowed, not found, impossible now. More "
        "of them get one line together, with their number.",
        low=1,
        high=100000,
    )


@dataclass(frozen=True, slots=True)
class Logs:
    level: str = setting("info", "The least that is written.", choices=("debug", "info", "warning", "error"))
    format: str = setting("auto", "auto is text on a terminal and json elsewhere.", choices=("auto", "text", "json"))


@dataclass(frozen=True, slots=True)
class Config:
    agent: Agent = Agent()
    qsd: Qsd = Qsd()
    qmp: Qmp = Qmp()
    libvirt: Libvirt = Libvirt()
    images: Images = Images()
    jobs: Jobs = Jobs()
    access: Access = Access()
    exports: Exports = Exports()
    tls: Tls = Tls()
    api: Api = Api()
    dbus: Dbus = Dbus()
    data: Data = Data()
    store: Store = Store()
    metrics: Metrics = Metrics()
    audit: Audit = Audit()
    logs: Logs = Logs()
    origin: Mapping[str, str] = field(default_factory=dict)


SECTIONS = tuple(section.name for section in fields(Config) if section.name != "origin")

DEFAULTS = Config()


def rules(section: str) -> dict[str, tuple[Any, Rule]]:
    """key → (default, rule) of a section, in the order of the manual."""
    table: tuple[Field[Any], ...] = fields(type(getattr(DEFAULTS, section)))
    return {item.name: (item.default, item.metadata["rule"]) for item in table}
