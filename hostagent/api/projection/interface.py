"""The interfaces as their documents say (org.hostagent1.xml, standard.xml): what a call must look like, the types of
properties, and the answers to introspection."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from hostagent.api.projection.message import Variant, text

NAME = "org.hostagent1"
MANAGER, JOB, EXPORT, GRANT = (f"{NAME}.{noun}" for noun in ("Manager", "Job", "Export", "Grant"))
PEER, INTROSPECTABLE, PROPERTIES, OBJECT_MANAGER = (
    f"org.freedesktop.DBus.{noun}" for noun in ("Peer", "Introspectable", "Properties", "ObjectManager")
)
DOCTYPE = (
    '<!DOCTYPE node PUBLIC "-//freedesktop//DTD D-BUS Object Introspection 1.0//EN"\n'
    '"http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd">\n'
)


@dataclass(frozen=True, slots=True)
class Interface:
    """The signatures of a method's arguments in and out, of a signal's, and the types of properties, by name; `xml` is
    its element."""

    methods: Mapping[str, tuple[str, str]]
    signals: Mapping[str, str]
    properties: Mapping[str, str]
    xml: str

    def variants(self, values: Mapping[str, Any]) -> dict[str, Variant]:
        """All properties, with their types."""
        return {name: Variant(type_, _fit(type_, values[name])) for name, type_ in self.properties.items()}


def _fit(type_: str, value: Any) -> Any:
    """What a reading in JSON may lack is nothing; text is made what the bus can carry."""
    match type_:
        case "s":
            return text(value or "")
        case "t":
            return min(max(0, int(value or 0)), 2**64 - 1)
        case "as":
            return [text(item) for item in value or ()]
        case "a{ss}":
            return {text(key): text(item) for key, item in (value or {}).items()}
        case "a(ss)" | "(sss)":
            return [_fit("s" if isinstance(item, str | None) else "as", item) for item in value]
        case _:
            return value


def _read(name: str) -> dict[str, Interface]:
    root = ET.fromstring((files(__package__) / name).read_text(encoding="utf-8"))  # noqa: S314 - it is our own
    ET.indent(root)
    return {element.get("name", ""): _interface(element) for element in root}


def _interface(element: ET.Element) -> Interface:
    def arguments(of: ET.Element, direction: str) -> str:
        return "".join(arg.get("type", "") for arg in of.iter("arg") if arg.get("direction", "out") == direction)

    return Interface(
        methods={one.get("name", ""): (arguments(one, "in"), arguments(one, "out")) for one in element.iter("method")},
        signals={one.get("name", ""): arguments(one, "out") for one in element.iter("signal")},
        properties={one.get("name", ""): one.get("type", "") for one in element.iter("property")},
        xml=ET.tostring(element, encoding="unicode").rstrip(),
    )


OURS = _read("org.hostagent1.xml")
STANDARD = _read("standard.xml")
ALL = {**OURS, **STANDARD}


def interfaces_at(path: str, ours: str | None) -> list[str]:
    """The interfaces of an object, or of a path on the way to one."""
    return [
        *(name for name in STANDARD if name != OBJECT_MANAGER or path == "/"),
        *([ours] if ours is not None else []),
    ]


def introspection(names: Iterable[str], children: Iterable[str]) -> str:
    inside = [*(f"  {ALL[name].xml}" for name in names), *(f'  <node name="{child}"/>' for child in children)]
    return DOCTYPE + "\n".join(["<node>", *inside, "</node>", ""])
