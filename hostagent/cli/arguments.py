"""What the words of a command line mean: targets, labels, sizes. A wrong word is a usage error (exit 2) at once."""

from __future__ import annotations

import argparse
import os
import uuid
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hostagent.cli.client import Client
from hostagent.errors import AgentError
from hostagent.sizes import parse_rate, parse_size

if TYPE_CHECKING:
    from hostagent.cli.away import Away


def common(*, agents: str = "all") -> argparse.ArgumentParser:
    """The options that every command has, before or after its noun and verb. `agents` are those that it can ask: all,
    this host's (`here`) or `none`; other's options are taken, to be refused in words (`refuse_agents`)."""
    parser = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    group = parser.add_argument_group("common options")
    text = "the agent's socket (else HOSTAGENT_SOCKET, else the usual)"
    group.add_argument("--socket", metavar="PATH", help=argparse.SUPPRESS if agents == "none" else text)
    if agents == "all":
        _away(group)
    else:
        group.add_argument("--url", metavar="URL", dest="api_url", help=argparse.SUPPRESS)
    group.add_argument("--json", action="store_true", help="print JSON, for programs")
    group.add_argument("--no-color", action="store_true", help="print without colours")
    return parser


def _away(group: Any) -> None:
    group.add_argument(
        "--url", metavar="URL", dest="api_url", help="an agent by TCP: https://HOST:PORT (HOSTAGENT_URL)"
    )
    text = "authorities (PEM) that its certificate must be of, instead of the system's (HOSTAGENT_CAFILE)"
    group.add_argument("--cafile", metavar="FILE", dest="api_cafile", help=text)
    text = "our certificate (PEM) for it (HOSTAGENT_CERTIFICATE)"
    group.add_argument("--cert", metavar="FILE", dest="api_certificate", help=text)
    group.add_argument("--key", metavar="FILE", dest="api_key", help="its key, where it is not in it (HOSTAGENT_KEY)")
    text = "a file with our token for it (HOSTAGENT_TOKEN_FILE)"
    group.add_argument("--token-file", metavar="FILE", dest="api_token_file", help=text)


NBD = ("nbd://", "nbd+unix://")

AWAY = ("url", "cafile", "certificate", "key", "token_file")
COMMON_DEFAULTS = {
    **{"socket": None, "json": False, "no_color": False, "agents": "all"},
    **{f"api_{name}": None for name in AWAY},
}


def connect(args: argparse.Namespace) -> Client:
    if (far := away(args)) is not None:
        return Client(far)
    return Client(socket_path(args), owners=trusted(named_socket(args)))


def refuse_agents(args: argparse.Namespace) -> None:
    """AgentError where an agent is named to a command that cannot ask it: what it did would be done here instead."""
    far = {f"--{'cert' if name == 'certificate' else name.replace('_', '-')}": f"api_{name}" for name in AWAY}
    refused = {"all": {}, "here": far, "none": {**far, "--socket": "socket"}}[args.agents]
    for option, name in refused.items():
        if getattr(args, name) is None:
            continue
        message = f"{option} is for an agent of another host, and `hostagent {args.noun}` works on this host alone"
        remedy = f"leave it out; to do this on another host, run it there (ssh HOST hostagent {args.noun} …)"
        if name == "socket":
            message = f"{option} is for who asks an agent, and `hostagent {args.noun}` asks none"
            remedy = f"leave it out; what this goes by says `hostagent {args.noun} --help`"
        if option in ("--cafile", "--key"):
            remedy += f"; for the server of a ticket's URL write it after `{args.noun}`"
        raise AgentError("invalid", message, field=option.removeprefix("--"), remedy=remedy)


def away(args: argparse.Namespace) -> Away | None:
    """The agent of another host that was named, by an option or else in the environment; a --socket wins over that."""
    given = {name: getattr(args, f"api_{name}") or os.environ.get(f"HOSTAGENT_{name.upper()}") or "" for name in AWAY}
    if args.api_url and args.socket:
        raise AgentError("invalid", "--url and --socket are two agents", field="url", remedy="name one of them")
    if not given["url"] or args.socket:
        return None
    from hostagent.cli.away import Away

    return Away(**given)


def named_socket(args: argparse.Namespace) -> Path | None:
    named = args.socket or os.environ.get("HOSTAGENT_SOCKET")
    return Path(named) if named else None


def trusted(named: Path | None) -> Collection[int] | None:
    """Whose agent may answer: anybody's at a socket that the user named, and root's or his own at the usual one, which
    in /tmp anybody may have made."""
    return None if named else {0, os.geteuid()}


def socket_path(args: argparse.Namespace) -> Path:
    if (named := named_socket(args)) is not None:
        return named
    from hostagent.config_text import default_runtime_dir

    return default_runtime_dir(os.environ) / "hostagent.sock"


def target(text: str) -> str:
    """`DOMAIN/DISK`, URIs and absolute paths as they are; `./x` and `../x` below the present folder."""
    if "\0" in text or not text:
        raise argparse.ArgumentTypeError("a target cannot be empty or have a NUL in it")
    if text.startswith(("./", "../")):
        return _absolute(text)
    if "/" not in text:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a path nor DOMAIN/DISK; write ./{text} for a file here")
    return text


def layer(text: str) -> str:
    """A layer of a chain: a path, or QEMU's index of it, `vda[3]`."""
    return _absolute(text) if text.startswith(("./", "../")) else text


def path(text: str) -> str:
    """A path where nothing but a path can stand."""
    if "\0" in text or not text:
        raise argparse.ArgumentTypeError("a path cannot be empty or have a NUL in it")
    return text if text.startswith("/") else _absolute(text)


def file(text: str) -> str:
    """A path of what is read here, where no network image can be."""
    if not text.startswith(NBD):
        return path(text)
    raise argparse.ArgumentTypeError(
        f"{text!r} is an NBD URI, and only files and block devices are read here; ask its server (nbdinfo --map URI), "
        "or export it: hostagent export start URI"
    )


def dest(text: str) -> str:
    """Where a copy goes, or what is granted: a path, or an NBD URI."""
    return text if text.startswith(NBD) else path(text)


def _absolute(text: str) -> str:
    """`text` from the present folder. Symbolic links are not resolved: what they mean is the agent's to find out."""
    folder = Path.cwd()  # has no links in it, so that a leading ../ may be taken literally
    while text.startswith(("./", "../")):
        folder = folder.parent if text.startswith("../") else folder
        text = text.split("/", 1)[1].lstrip("/")
    return str(folder / text)


def _from_sizes(parse: Callable[[str], int], what: str) -> Callable[[str], int]:
    def convert(text: str) -> int:
        try:
            return parse(text)
        except AgentError as error:
            raise argparse.ArgumentTypeError(f"{error.message}; {error.remedy}") from error

    convert.__name__ = what
    return convert


size = _from_sizes(parse_size, "size")
rate = _from_sizes(parse_rate, "rate")


def label(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, value


def object_id(text: str) -> str:
    try:
        return str(uuid.UUID(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a UUID") from error


def count(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 10**9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds") from error
    if not 0 < value < 10**9:
        raise argparse.ArgumentTypeError(f"{text} seconds is not a time to wait")
    return value


class Pairs(argparse.Action):
    """Further TARGET DEST pairs."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        if len(values) % 2:
            parser.error(f"{values[-1]}: a disk is two words, TARGET DEST")
        try:
            pairs = [(target(one), dest(other)) for one, other in zip(values[::2], values[1::2], strict=True)]
        except argparse.ArgumentTypeError as error:
            parser.error(str(error))
        setattr(namespace, self.dest, pairs)
