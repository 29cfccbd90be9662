"""The settings of the agent: their names, defaults, limits and manual, and where each value came from.

The dataclasses below are the only list of settings. Each field's default gives its type, and its text is its manual:
`--show-config` and the example file are printed from them. A value comes from the default, then hostagent.toml, then
its drop-ins in name order, then HOSTAGENT_SECTION_KEY, then the command line; the last one wins. Whatever is unknown,
of the wrong type or out of range is refused before anything starts. A `Config` comes from `load`, which also fills the
settings whose default depends on the machine or the user.
"""
# ruff: noqa: RUF009 - `setting` is dataclasses.field with the manual in its metadata: it may stand as a default

from __future__ import annotations

import difflib
import json
import os
import re
import socket
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from hostagent.errors import AgentError
from hostagent.sizes import parse_size

T = TypeVar("T")

MIB, GIB = 1 << 20, 1 << 30
DEFAULT_FILE = "/etc/hostagent/hostagent.toml"
ENV_PREFIX = "HOSTAGENT_"
CLIENT_VARIABLES = frozenset({"HOSTAGENT_SOCKET"})  # read by the command line, not settings of the agent
_LARGEST_FILE = 1 * MIB  # of TOML; a settings file has a few KiB
_LONGEST_SOCKET = 107  # bytes of sun_path before its NUL (unix(7))


@dataclass(frozen=True, slots=True)
class Rule:
    """What a value must be, beyond its type, and its manual.

    `unset` says what stands for an empty default, `usual` is what root gets then.
    """

    manual: str
    low: float | None = None
    high: float | None = None
    size: bool = False
    choices: tuple[str, ...] = ()
    unset: str = ""
    usual: str = ""
    servers: bool = False


def setting(
    default: T,
    manual: str,
    *,
    low: float | None = None,
    high: float | None = None,
    size: bool = False,
    choices: tuple[str, ...] = (),
    unset: str = "",
    usual: str = "",
    servers: bool = False,
) -> T:
    return field(default=default, metadata={"rule": Rule(manual, low, high, size, choices, unset, usual, servers)})


UNSET = Path()


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
        "holds up nothing.",
        unset="for a plain user empty",
        usual="qemu:///system",
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
        "Seconds between two looks at which domain uses which file, besides those that events start.",
        low=1,
        high=86400,
    )
    agree_timeout: float = setting(
        5.0,
        "Seconds for libvirt to say of a disk's chain what the image itself says, once a job on it has ended.",
        low=0.1,
        high=600,
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
    queue: int = setting(1000, "Jobs that may wait. One more is refused with `limit`.", low=0, high=100000)
    group: int = setting(
        16, "Disks of one group, at most; as all are copied at once, never more than `width`.", low=2, high=100
    )
    progress_interval: float = setting(0.5, "Seconds between two readings of the cursor.", low=0.05, high=60)
    abort_timeout: float = setting(
        30.0, "Seconds until a cancelled job must have ended; after that `abort --force` may kill.", low=0.1, high=3600
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
    nbd_timeout: float = setting(10.0, "Seconds for the agent's own NBD calls.", low=0.1, high=600)
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
    max_connections: int = setting(256, "Requests at a time.", low=1, high=10000)
    wait_limit: float = setting(60.0, "The longest `?wait=`, in seconds.", low=0, high=600)
    list_limit: int = setting(1000, "Objects on one page of a list.", low=1, high=10000)
    sse_heartbeat: float = setting(15.0, "Seconds between comments that keep an event stream alive.", low=0.1, high=600)
    sse_subscribers: int = setting(64, "Event streams at a time.", low=0, high=10000)
    sse_queue: int = setting(1000, "Events that wait for one slow stream before it loses some.", low=10, high=100000)
    keepalive: int = setting(5, "Seconds that an idle connection is kept.", low=1, high=600)


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
    store: Store = Store()
    logs: Logs = Logs()
    origin: Mapping[str, str] = field(default_factory=dict)


SECTIONS = tuple(section.name for section in fields(Config) if section.name != "origin")


def default_file(env: Mapping[str, str]) -> Path | None:
    """The settings file to read when none was named: /etc's for root, the XDG one for a plain user, if it is there."""
    if os.geteuid() == 0:
        path = Path(DEFAULT_FILE)
    else:
        path = Path(env.get("XDG_CONFIG_HOME") or _home(env) / ".config") / "hostagent" / "hostagent.toml"
    return path if path.exists() else None


def default_runtime_dir(env: Mapping[str, str]) -> Path:
    if os.geteuid() == 0:
        return Path("/run/hostagent")
    base = env.get("XDG_RUNTIME_DIR", "")
    return Path(base) / "hostagent" if base.startswith("/") else Path(f"/tmp/hostagent-{os.geteuid()}")  # noqa: S108


def load(
    *,
    file: Path | None = None,
    env: Mapping[str, str] | None = None,
    overrides: Mapping[str, str] | None = None,
) -> Config:
    """The settings in force. `overrides` are the command line's, by `section.key`."""
    env = os.environ if env is None else env
    values: dict[str, Any] = {}
    origin = {f"{section}.{key}": "default" for section in SECTIONS for key in _rules(section)}
    for name, raw, source in _sources(file, env, overrides or {}):
        section, key = name.split(".", 1)
        values[name] = _checked(section, key, raw, source)
        origin[name] = source
    return _settled(values, origin, env)


def example() -> str:
    """hostagent.toml with every setting at its default, commented out."""
    head = (
        "# Settings of `hostagent serve`. What stands here, commented out, is the default; `hostagent serve\n"
        "# --show-config` prints what is in force and where it came from. Files in hostagent.d/ beside this one are\n"
        "# read after it, in name order; then HOSTAGENT_SECTION_KEY from the environment; then the command line.\n"
        '# Sizes are bytes, or text like "64MiB".\n'
    )
    parts = [head]
    for section in SECTIONS:
        lines = [f"[{section}]"]
        for key, (default, rule) in _rules(section).items():
            lines += [*_manual(rule), f"#{key} = {_toml(rule.usual or default, rule)}", ""]
        parts.append("\n".join(lines))
    return "\n".join(parts)


def show(config: Config) -> str:
    """The settings in force as TOML, each with its manual and its origin."""
    parts = []
    for section in SECTIONS:
        lines = [f"[{section}]"]
        for key, (_, rule) in _rules(section).items():
            value = getattr(getattr(config, section), key)
            source = json.dumps(config.origin.get(f"{section}.{key}", "default"), ensure_ascii=True)[1:-1]
            lines += [*_manual(rule), f"{key} = {_toml(value, rule)}  # from: {source}", ""]
        parts.append("\n".join(lines))
    return "\n".join(parts)


def plain(config: Config) -> dict[str, object]:
    """`section.key` → value, as JSON can carry it; `restored` reads it."""
    return {
        f"{section}.{key}": _plain(getattr(getattr(config, section), key))
        for section in SECTIONS
        for key in _rules(section)
    }


def restored(values: Mapping[str, object], source: str) -> Config:
    """The settings that an agent says it has. One of another version may know others: those are left out."""
    known = {f"{section}.{key}" for section in SECTIONS for key in _rules(section)} & values.keys()
    checked: dict[str, Any] = {}
    for name in known:
        section, key = name.split(".", 1)
        checked[name] = _checked(section, key, values[name], source)
    origin = {f"{section}.{key}": "default" for section in SECTIONS for key in _rules(section)}
    return _settled(checked, origin | dict.fromkeys(known, source), {})


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return "" if value == UNSET else str(value)
    return list(value) if isinstance(value, tuple) else value


# Where values come from


def _sources(
    file: Path | None, env: Mapping[str, str], overrides: Mapping[str, str]
) -> Iterator[tuple[str, object, str]]:
    for path in _files(file):
        yield from _from_toml(path)
    for name in sorted(env):
        if name.startswith(ENV_PREFIX) and name not in CLIENT_VARIABLES:
            section, key = _env_name(name)
            yield f"{section}.{key}", _from_text(section, key, env[name]), name
    for name, text in overrides.items():
        section, _, key = name.partition(".")
        _known(section, key, "the command line")
        yield name, _from_text(section, key, text), "the command line"


def _files(file: Path | None) -> list[Path]:
    if file is None:
        return []
    drop_ins = file.parent / "hostagent.d"
    return [file, *sorted(path for path in drop_ins.glob("*.toml") if path.is_file())]


def _from_toml(path: Path) -> Iterator[tuple[str, object, str]]:
    for section, table in _parsed(path).items():
        _known(section, None, str(path))
        if not isinstance(table, dict):
            raise AgentError("invalid", f"{path}: {section} must be a [{section}] table", field=section, value=table)
        for key, value in table.items():
            _known(section, key, str(path))
            yield f"{section}.{key}", value, str(path)


def _parsed(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            text = stream.read(_LARGEST_FILE + 1)
    except OSError as problem:
        raise AgentError(
            "invalid", f"cannot read the settings in {path}: {problem.strerror}", field="config", value=str(path)
        ) from problem
    if len(text) > _LARGEST_FILE:
        raise AgentError("invalid", f"{path} is larger than {_LARGEST_FILE} bytes", field="config", value=str(path))
    try:
        return tomllib.loads(text.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as problem:
        raise AgentError("invalid", f"{path} is not TOML: {problem}", field="config", value=str(path)) from problem


def _env_name(name: str) -> tuple[str, str]:
    section, _, key = name.removeprefix(ENV_PREFIX).lower().partition("_")
    if section in SECTIONS and key in _rules(section):
        return section, key
    every = {f"{ENV_PREFIX}{s}_{k}".upper(): (s, k) for s in SECTIONS for k in _rules(s)}
    raise _unknown("setting", name, list(every), "the environment")


def _from_text(section: str, key: str, text: str) -> object:
    """A value of the environment or the command line, as TOML would have given it."""
    default, rule = _rules(section)[key]
    if isinstance(default, tuple):
        return [item for item in text.split("," if rule.servers else ":") if item]  # as in PATH
    if isinstance(default, int) and not rule.size:
        return int(text) if text.strip().lstrip("-").isdecimal() and len(text) < 20 else text
    if isinstance(default, float):
        try:
            return float(text)
        except ValueError:
            return text
    return text


# What a value must be


def _rules(section: str) -> dict[str, tuple[Any, Rule]]:
    """key → (default, rule) of a section, in the order of the manual."""
    table: tuple[Field[Any], ...] = fields(type(getattr(_DEFAULTS, section)))
    return {item.name: (item.default, item.metadata["rule"]) for item in table}


def _known(section: str, key: str | None, source: str) -> None:
    if section not in SECTIONS:
        raise _unknown("section", section, list(SECTIONS), source)
    if key is not None and key not in _rules(section):
        raise _unknown("setting", f"{section}.{key}", [f"{section}.{k}" for k in _rules(section)], source)


def _unknown(what: str, name: str, known: list[str], source: str) -> AgentError:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return AgentError(
        "invalid",
        f"{source} has the unknown {what} {name!r}; the nearest known one is {near!r}",
        field=name,
        remedy=f"write {near}, or remove it; `hostagent serve --show-config` lists every setting",
    )


def _checked(section: str, key: str, raw: object, source: str) -> Any:
    """`raw` as the type of the default, within the rule, or a refusal that names key, value, origin and need."""
    default, rule = _rules(section)[key]
    name = f"{section}.{key}"
    if rule.size and isinstance(raw, str):
        try:
            raw = parse_size(raw, field=name)
        except AgentError as problem:
            raise _wrong(name, raw, source, 'a size in bytes, or text like "64MiB"') from problem
    if isinstance(default, tuple):
        fits, what = (_is_server, "servers (HOST, HOST:PORT) and absolute paths") if rule.servers else _PATHS
        if not isinstance(raw, list) or not all(fits(item) for item in raw):
            raise _wrong(name, raw, source, f"a list of {what}")
        return tuple(raw)
    if isinstance(default, Path):
        if raw == "" and default == UNSET and not rule.unset:
            return UNSET  # said to be not set
        if not _is_absolute(raw):
            raise _wrong(name, raw, source, "an absolute path")
        return Path(str(raw))
    if isinstance(default, str):
        if not isinstance(raw, str) or not raw.isprintable() or (rule.choices and raw not in rule.choices):
            raise _wrong(name, raw, source, " or ".join(rule.choices) or "text")
        return raw
    return _number(name, raw, source, default=default, rule=rule)


def _is_absolute(raw: object) -> bool:
    return isinstance(raw, str) and raw.startswith("/") and "\0" not in raw


def _is_server(raw: object) -> bool:
    if _is_absolute(raw):
        return True
    found = _SERVER.fullmatch(raw) if isinstance(raw, str) else None
    return found is not None and int(found["port"] or 1) in range(1, 1 << 16)


_SERVER = re.compile(r"(\[[0-9a-f:]+\]|[a-z0-9][a-z0-9._-]*)(:(?P<port>[0-9]{1,5}))?", re.ASCII | re.IGNORECASE)
_PATHS = (_is_absolute, "absolute paths")


def _number(name: str, raw: object, source: str, *, default: float, rule: Rule) -> float:
    whole = isinstance(default, int)
    kind = "a size in bytes" if rule.size else "a whole number" if whole else "a number of seconds"
    if isinstance(raw, bool) or not isinstance(raw, int if whole else int | float):
        raise _wrong(name, raw, source, kind)
    low, high = rule.low, rule.high
    value = raw if whole else float(raw)
    if not (low is None or value >= low) or not (high is None or value <= high):
        raise _wrong(name, raw, source, f"{kind}, {_range(low, high)}")
    return value


def _range(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return f"at least {low:.15g}" if low is not None else f"at most {high:.15g}"
    return f"from {low:.15g} to {high:.15g}"


def _wrong(name: str, value: object, source: str, expected: str) -> AgentError:
    return AgentError(
        "invalid",
        f"{name} is {str(value)[:200]!r} in {source}; it must be {expected}",
        field=name,
        value=value if isinstance(value, int | float | str) else repr(value)[:200],
        remedy=f"set {name} to {expected}",
    )


# Settings whose default depends on the machine or the user


def _settled(values: Mapping[str, Any], origin: Mapping[str, str], env: Mapping[str, str]) -> Config:
    sections: dict[str, Any] = {}
    for section in SECTIONS:
        given = {key: values[f"{section}.{key}"] for key in _rules(section) if f"{section}.{key}" in values}
        sections[section] = replace(getattr(_DEFAULTS, section), **given)
    config = Config(**sections, origin=dict(origin))
    root = os.geteuid() == 0
    agent = replace(
        config.agent,
        state_dir=_or(config.agent.state_dir, _default_state_dir(env)),
        runtime_dir=_or(config.agent.runtime_dir, default_runtime_dir(env)),
        host=config.agent.host or socket.gethostname(),
    )
    user = config.access.hypervisor_user
    if not user and "access.hypervisor_user" not in values and root:
        user = "libvirt-qemu"
    uri = config.libvirt.uri
    if not uri and "libvirt.uri" not in values and root:
        uri = "qemu:///system"
    heir = config.access.unknown_owner
    if not heir and "access.unknown_owner" not in values and root:
        heir = "root:root"
    config = replace(
        config,
        agent=agent,
        libvirt=replace(config.libvirt, uri=uri),
        access=replace(config.access, hypervisor_user=user, unknown_owner=heir),
        qsd=replace(config.qsd, user=config.qsd.user or user),
        api=replace(config.api, socket=_or(config.api.socket, agent.runtime_dir / "hostagent.sock")),
    )
    _fits_together(config)
    return config


def _fits_together(config: Config) -> None:
    if len(os.fsencode(config.api.socket)) > _LONGEST_SOCKET:
        raise AgentError(
            "invalid",
            f"the socket {str(config.api.socket)!r} has more than {_LONGEST_SOCKET} bytes, the limit of unix sockets",
            field="api.socket",
            value=str(config.api.socket),
            remedy="set agent.runtime_dir to a shorter path",
        )
    if config.libvirt.reconnect_wait > config.libvirt.reconnect_wait_max:
        raise _wrong(
            "libvirt.reconnect_wait", config.libvirt.reconnect_wait, config.origin["libvirt.reconnect_wait"],
            f"at most libvirt.reconnect_wait_max ({config.libvirt.reconnect_wait_max:g})",
        )  # fmt: skip
    if config.jobs.settle_retry > config.jobs.settle_retry_max:
        raise _wrong(
            "jobs.settle_retry", config.jobs.settle_retry, config.origin["jobs.settle_retry"],
            f"at most jobs.settle_retry_max ({config.jobs.settle_retry_max:g})",
        )  # fmt: skip


def _or(value: Path, default: Path) -> Path:
    return default if value == UNSET else value


def _default_state_dir(env: Mapping[str, str]) -> Path:
    if os.geteuid() == 0:
        return Path("/var/lib/hostagent")
    base = env.get("XDG_STATE_HOME", "")
    return (Path(base) if base.startswith("/") else _home(env) / ".local/state") / "hostagent"


def _home(env: Mapping[str, str]) -> Path:
    home = env.get("HOME", "")
    return Path(home) if home.startswith("/") else Path.home()


# TOML text


def _manual(rule: Rule) -> list[str]:
    text = rule.manual
    if rule.choices:
        text += f" One of: {', '.join(rule.choices)}."
    if rule.unset:
        text += f" Default: {'; '.join(filter(None, (rule.usual, rule.unset)))}."
    lines, line = [], "#"
    for word in text.split():
        if len(line) + len(word) >= 118:
            lines.append(line)
            line = "#"
        line += f" {word}"
    return [*lines, line]


def _toml(value: Any, rule: Rule) -> str:
    if isinstance(value, Path):
        return '""' if value == UNSET else json.dumps(str(value))
    if isinstance(value, tuple):
        return json.dumps(list(value))
    if rule.size:
        return _whole_size(value)
    return json.dumps(value)


def _whole_size(size: int) -> str:
    """The size in the largest unit that says it exactly, so that what is printed reads back the same."""
    for unit, factor in (("TiB", 1 << 40), ("GiB", GIB), ("MiB", MIB), ("KiB", 1024)):
        if size and size % factor == 0:
            return f'"{size // factor}{unit}"'
    return str(size)


_DEFAULTS = Config()
