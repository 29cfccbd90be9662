"""What the words of a command line mean: targets, labels, sizes. A wrong word is a usage error (exit 2) at once."""

from __future__ import annotations

import argparse
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostagent.cli.client import Client
from hostagent.errors import AgentError
from hostagent.sizes import parse_rate, parse_size


def common() -> argparse.ArgumentParser:
    """The options that every command has, before or after its noun and verb."""
    parser = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    group = parser.add_argument_group("common options")
    group.add_argument("--socket", metavar="PATH", help="the agent's socket (else HOSTAGENT_SOCKET, else the usual)")
    group.add_argument("--json", action="store_true", help="print JSON, for programs")
    group.add_argument("--no-color", action="store_true", help="print without colours")
    return parser


NBD = ("nbd://", "nbd+unix://")

COMMON_DEFAULTS = {"socket": None, "json": False, "no_color": False}


def connect(args: argparse.Namespace) -> Client:
    return Client(socket_path(args))


def socket_path(args: argparse.Namespace) -> Path:
    named = args.socket or os.environ.get("HOSTAGENT_SOCKET")
    if named:
        return Path(named)
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
