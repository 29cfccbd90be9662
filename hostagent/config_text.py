"""The settings as text: read and checked, and printed; where each value came from.

A value comes from the default, then hostagent.toml, then its drop-ins in name order, then HOSTAGENT_SECTION_KEY, then
the command line; the last one wins. Whatever is unknown, of the wrong type or out of range is refused before anything
starts.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import os
import re
import socket
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hostagent import listening
from hostagent.addresses import tcp_address
from hostagent.config import DEFAULTS, GIB, MIB, SECTIONS, UNSET, Config, Rule, rules
from hostagent.errors import AgentError
from hostagent.sizes import parse_size

DEFAULT_FILE = "/etc/hostagent/hostagent.toml"
DROP_INS = "hostagent.d"
ENV_PREFIX = "HOSTAGENT_"
CLIENT_VARIABLES = frozenset(
    f"HOSTAGENT_{name}" for name in ("SOCKET", "URL", "CAFILE", "CERTIFICATE", "KEY", "TOKEN_FILE")
)  # read by the command line, not settings of the agent
_LARGEST_FILE = 1 * MIB  # of TOML; a settings file has a few KiB
_LONGEST_SOCKET = 107  # bytes of sun_path before its NUL (unix(7))


def default_file(env: Mapping[str, str]) -> Path | None:
    """The settings to read when none were named: /etc's for root, the XDG ones for a plain user. The file, or where
    there is none the folder of its drop-ins, or None. What is in a folder that we may not look into (another user's
    HOME, after sudo -u) is not there for us."""
    if os.geteuid() == 0:
        path = Path(DEFAULT_FILE)
    else:
        path = Path(env.get("XDG_CONFIG_HOME") or _home(env) / ".config") / "hostagent" / "hostagent.toml"
    try:
        return next((one for one in (path, path.with_name(DROP_INS)) if one.exists()), None)
    except PermissionError:
        return None


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
    """The settings in force. `file` may be the folder of the drop-ins alone; `overrides` are the command line's, by
    `section.key`."""
    env = os.environ if env is None else env
    values: dict[str, Any] = {}
    origin = {f"{section}.{key}": "default" for section in SECTIONS for key in rules(section)}
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
        for key, (default, rule) in rules(section).items():
            lines += [*_manual(rule), f"#{key} = {literal(default, rule)}", ""]
        parts.append("\n".join(lines))
    return "\n".join(parts)


def show(config: Config) -> str:
    """The settings in force as TOML, each with its manual and its origin."""
    parts = []
    for section in SECTIONS:
        lines = [f"[{section}]"]
        for key, (_, rule) in rules(section).items():
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
        for key in rules(section)
    }


def restored(values: Mapping[str, object], source: str) -> Config:
    """The settings that an agent says it has. One of another version may know others: those are left out."""
    known = {f"{section}.{key}" for section in SECTIONS for key in rules(section)} & values.keys()
    checked: dict[str, Any] = {}
    for name in known:
        section, key = name.split(".", 1)
        checked[name] = _checked(section, key, values[name], source)
    origin = {f"{section}.{key}": "default" for section in SECTIONS for key in rules(section)}
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


def _files(file: Path | None) -> Iterator[Path]:
    """The file first: where it cannot be reached, that is what is said."""
    if file is None:
        return
    drop_ins = file
    if file.name != DROP_INS or not file.is_dir():
        yield file
        drop_ins = file.with_name(DROP_INS)
    yield from sorted(path for path in drop_ins.glob("*.toml") if path.is_file())


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
        what, remedy = f"{path} is not TOML: {problem}", _mend(path, text, str(problem))
        raise AgentError("invalid", what, field="config", value=str(path), remedy=remedy) from problem


def _mend(path: Path, text: bytes, problem: str) -> str:
    """What to do about what tomllib says. It says nothing of the section's first header."""
    found = re.search(r"at line (\d+)", problem)
    where = f"line {found[1]} of " if found else "the end of " if "end of document" in problem else ""
    place = f"{where}{path}"
    twice = re.match(r"Cannot declare \('(\w+)',\) twice", problem)
    if twice is None:
        return f"correct {place}, or put it back as it was"
    header = re.compile(rb"\s*\[\s*%s\s*\]" % twice[1].encode())
    first = next((number for number, line in enumerate(text.splitlines(), 1) if header.match(line)), None)
    there = f"[{twice[1]}] that is there already{f' (line {first})' if first else ''}"
    own = path if path.parent.name == DROP_INS else path.with_name(DROP_INS) / "NAME.toml"
    elsewhere = "" if own == path else f", or all of it into a file of its own, {own}"
    return f"remove the [{twice[1]}] in {place} and put the keys below it under the {there}{elsewhere}"


def _env_name(name: str) -> tuple[str, str]:
    section, _, key = name.removeprefix(ENV_PREFIX).lower().partition("_")
    if section in SECTIONS and key in rules(section):
        return section, key
    every = {f"{ENV_PREFIX}{s}_{k}".upper(): (s, k) for s in SECTIONS for k in rules(s)}
    raise _unknown("setting", name, list(every), "the environment")


def _from_text(section: str, key: str, text: str) -> object:
    """A value of the environment or the command line, as TOML would have given it."""
    default, rule = rules(section)[key]
    if isinstance(default, tuple):
        return [item for item in text.split("," if rule.servers or rule.words else ":") if item]  # as in PATH
    if isinstance(default, bool):
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(text.lower(), text)
    if isinstance(default, int) and not rule.size:
        return int(text) if text.strip().lstrip("-").isdecimal() and len(text) < 20 else text
    if isinstance(default, float):
        try:
            return float(text)
        except ValueError:
            return text
    return text


# What a value must be


def _known(section: str, key: str | None, source: str) -> None:
    if section not in SECTIONS:
        raise _unknown("section", section, list(SECTIONS), source)
    if key is not None and key not in rules(section):
        raise _unknown("setting", f"{section}.{key}", [f"{section}.{k}" for k in rules(section)], source)


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
    default, rule = rules(section)[key]
    name = f"{section}.{key}"
    if rule.size and isinstance(raw, str):
        try:
            raw = parse_size(raw, field=name)
        except AgentError as problem:
            raise _wrong(name, raw, source, 'a size in bytes, or text like "64MiB"') from problem
    if isinstance(default, tuple):
        fits, what = _SERVERS if rule.servers else _WORDS if rule.words else _PATHS
        if not isinstance(raw, list) or not all(fits(item) for item in raw):
            raise _wrong(name, raw, source, f"a list of {what}")
        return tuple(raw)
    if isinstance(default, bool):
        if not isinstance(raw, bool):
            raise _wrong(name, raw, source, "true or false")
        return raw
    if isinstance(default, Path):
        if raw == "" and default == UNSET and not rule.unset:
            return UNSET  # said to be not set
        if not _is_absolute(raw):
            raise _wrong(name, raw, source, "an absolute path")
        return Path(str(raw))
    if isinstance(default, str):
        if not isinstance(raw, str) or not raw.isprintable() or (rule.choices and raw not in rule.choices):
            raise _wrong(name, raw, source, " or ".join(rule.choices) or "text")
        if rule.address and raw and tcp_address(raw) is None:
            raise _wrong(name, raw, source, "IP:PORT, as 127.0.0.1:18177 or [::1]:18177, or empty")
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
_SERVERS = (_is_server, "servers (HOST, HOST:PORT) and absolute paths")
_WORDS = (lambda raw: isinstance(raw, str) and raw.isprintable() and len(raw) <= 1024, "text")
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
        given = {key: values[f"{section}.{key}"] for key in rules(section) if f"{section}.{key}" in values}
        sections[section] = replace(getattr(DEFAULTS, section), **given)
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
        api=replace(
            config.api,
            socket=_or(config.api.socket, agent.runtime_dir / "hostagent.sock"),
            tokens_file=_or(config.api.tokens_file, agent.state_dir / "tokens.json"),
        ),
        audit=replace(config.audit, file=_or(config.audit.file, agent.state_dir / "audit.jsonl")),
        data=replace(
            config.data,
            local_socket=_or(config.data.local_socket, agent.runtime_dir / "data.sock"),
            control_socket=_or(config.data.control_socket, agent.runtime_dir / "data-control.sock"),
        ),
    )
    _fits_together(config)
    return config


def _fits_together(config: Config) -> None:
    listening.check(config.api)
    for name in ("api.socket", "data.local_socket", "data.control_socket", "data.cloudstack_socket"):
        section, key = name.split(".")
        path = getattr(getattr(config, section), key)
        if len(os.fsencode(path)) > _LONGEST_SOCKET:
            raise AgentError(
                "invalid",
                f"the socket {str(path)!r} has more than {_LONGEST_SOCKET} bytes, the limit of unix sockets",
                field=name,
                value=str(path),
                remedy="set agent.runtime_dir to a shorter path",
            )
    listen = tcp_address(config.metrics.listen)
    if listen and not ipaddress.ip_address(listen[0]).is_loopback and not config.metrics.beyond_loopback:
        raise AgentError(
            "invalid",
            f"metrics.listen is {config.metrics.listen!r} in {config.origin['metrics.listen']}, which is not this "
            "host's loopback",
            field="metrics.listen",
            value=config.metrics.listen,
            remedy="listen on 127.0.0.1, or set metrics.beyond_loopback = true: whoever reaches the address reads the "
            "names of guests and the paths of images",
        )
    if config.libvirt.reconnect_wait > config.libvirt.reconnect_wait_max:
        raise _wrong(
            "libvirt.reconnect_wait", config.libvirt.reconnect_wait, config.origin["libvirt.reconnect_wait"],
            f"at most libvirt.reconnect_wait_max ({config.libvirt.reconnect_wait_max:g})",
        )  # fmt: skip
    if config.dbus.reconnect_wait > config.dbus.reconnect_wait_max:
        raise _wrong(
            "dbus.reconnect_wait", config.dbus.reconnect_wait, config.origin["dbus.reconnect_wait"],
            f"at most dbus.reconnect_wait_max ({config.dbus.reconnect_wait_max:g})",
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


def manual(rule: Rule) -> str:
    """What a person must know of a setting, in one line."""
    text = rule.manual
    if rule.choices:
        text += f" One of: {', '.join(rule.choices)}."
    if rule.unset:
        text += f" Default: {'; '.join(filter(None, (rule.usual, rule.unset)))}."
    return text


def literal(default: object, rule: Rule) -> str:
    """The default in TOML, as root has it."""
    return _toml(rule.usual or default, rule)


def _manual(rule: Rule) -> list[str]:
    lines, line = [], "#"
    for word in manual(rule).split():
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
