"""The objects that are shown: the newest state of each, and what differs from the one before. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hostagent.api.projection import interface, objects
from hostagent.api.projection.message import Variant

KINDS = tuple(objects.INTERFACES)
Values = Mapping[str, Variant]


@dataclass(frozen=True, slots=True)
class Shown:
    """One object; its values are replaced, never changed."""

    path: str
    kind: str
    id: str
    interface: str
    values: Values

    def __getitem__(self, name: str) -> Any:
        return self.values[name].value


class Tree:
    """`most` objects; `hidden` are those that there is no room for. The manager is always there."""

    def __init__(self, most: int, manager: Mapping[str, Any]) -> None:
        self.most = most
        self._facts = manager
        self._objects: dict[str, dict[str, Shown]] = {kind: {} for kind in KINDS}
        self._exports: dict[str, set[str]] = {}
        self.hidden: set[tuple[str, str]] = set()

    @property
    def manager(self) -> Shown:
        values = interface.OURS[interface.MANAGER].variants({**self._facts, "Hidden": len(self.hidden)})
        return Shown(objects.ROOT, "manager", "", interface.MANAGER, values)

    def find(self, path: str) -> Shown | None:
        if path == objects.ROOT:
            return self.manager
        kind = path.removeprefix(objects.ROOT + "/").partition("/")[0]
        return self._objects.get(kind, {}).get(path)

    def all(self, kind: str) -> list[Shown]:
        return list(self._objects[kind].values())

    def __iter__(self) -> Iterator[Shown]:
        yield self.manager
        for kind in KINDS:
            yield from self._objects[kind].values()

    def __len__(self) -> int:
        return sum(map(len, self._objects.values()))

    def put(self, kind: str, id: str, properties: Mapping[str, Any]) -> Shown | None:
        """The object as it is now; None where there is no room for it."""
        path = objects.path_of(kind, id)
        if path not in self._objects[kind] and len(self) >= self.most:
            self.hidden.add((kind, id))
            return None
        self.hidden.discard((kind, id))
        name = objects.INTERFACES[kind]
        now = Shown(path, kind, id, name, interface.OURS[name].variants(properties))
        self._objects[kind][path] = now
        if kind == "export":
            self._exports.setdefault(now["Path"], set()).add(path)
        return now

    def remove(self, kind: str, id: str) -> Shown | None:
        self.hidden.discard((kind, id))
        gone = self._objects[kind].pop(objects.path_of(kind, id), None)
        if gone is not None and kind == "export":
            of_image = self._exports.get(gone["Path"], set())
            of_image.discard(gone.path)
            if not of_image:
                self._exports.pop(gone["Path"], None)
        return gone

    def exports_of(self, image: str) -> set[str]:
        """The paths of the exports of an image."""
        return self._exports.get(image, set())

    def managed(self) -> dict[str, dict[str, Values]]:
        """As GetManagedObjects answers."""
        return {one.path: {one.interface: one.values} for one in self}

    def children(self, path: str) -> list[str] | None:
        """The names below a path; None where there is nothing at all."""
        way = {"/": ["org"], "/org": [objects.ROOT.rpartition("/")[2]]}
        if path in way:
            return way[path]
        if path == objects.ROOT:
            return [kind for kind in KINDS if self._objects[kind]]
        parent, _, kind = path.rpartition("/")
        if parent == objects.ROOT and self._objects.get(kind):
            return [one.rpartition("/")[2] for one in self._objects[kind]]
        return [] if self.find(path) else None


def changed(now: Shown, before: Shown) -> dict[str, Variant]:
    return {name: value for name, value in now.values.items() if before.values.get(name) != value}
