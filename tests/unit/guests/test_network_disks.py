"""NBD exports as libvirt writes them, and which guest has one."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from hostagent.config import Libvirt
from hostagent.drivers import domain_xml
from hostagent.drivers.domain_xml import Domain, LiveLayer
from hostagent.drivers.libvirt import DomainRef
from hostagent.guests.network_disks import disk_xml, servers_of, uri_of
from hostagent.live import Live
from jobs.errors import JobError
from jobs.model import Drive

UUID = "4dea22b3-1d52-d8f3-2516-782e98ab3fa0"
URIS = [
    "nbd+unix:///?socket=/run/nbd/s",
    "nbd+unix:///vol%201/%C3%BC%26%27%22%3C?socket=/run/a%20%26b/s",
    "nbd://store1:10809/vol7",
    "nbd://[2001:db8::7]:10810/",
    "nbd://192.0.2.7:10809/a%3Ab",
]


def described(disks: str) -> Domain:
    text = f"<domain><uuid>{UUID}</uuid><name>web1</name><devices>{disks}</devices></domain>"
    return domain_xml.parse(text, size=1 << 20)


def disk(uri: str, target: str = "vda", inner: str = "") -> str:
    """As libvirt describes a disk that is this export."""
    return disk_xml(uri).replace("</disk>", f"<target dev='{target}'/>{inner}</disk>")


def layer(uri: str) -> LiveLayer:
    (found,) = described(disk(uri)).disks
    assert found.top is not None
    return found.top


@pytest.mark.parametrize("uri", URIS)
def test_an_export_is_known_again_in_libvirts_words(uri: str) -> None:
    assert uri_of(layer(uri)) == uri
    source = ElementTree.fromstring(disk_xml(uri)).find("source")
    assert source is not None and source.get("tls") == "no"


def test_what_is_no_such_export_has_no_uri() -> None:
    texts = [
        "<disk type='file'><source file='/x'/><target dev='vda'/></disk>",
        "<disk type='network'><source protocol='rbd' name='p/i'><host name='m' port='1'/></source><target dev='a'/></disk>",
        "<disk type='network'><source protocol='nbd'><host name='m'/><host name='n'/></source><target dev='a'/></disk>",
        "<disk type='network'><source protocol='nbd'><host transport='unix' socket='/a/../b'/></source><target dev='a'/></disk>",
    ]
    assert [uri_of(one.layers[0]) for text in texts for one in described(text).disks] == [None] * 4


def test_the_servers_of_any_protocol_are_known() -> None:
    assert servers_of(layer(URIS[0])) == [{"type": "unix", "path": "/run/nbd/s"}]
    assert servers_of(layer(URIS[3])) == [{"type": "inet", "host": "2001:db8::7", "port": "10810"}]
    text = "<disk type='network'><source protocol='rbd' name='p/i'><host name='m' port='1'/><host name='n'/></source>"
    (found,) = described(f"{text}<target dev='vda'/></disk>").disks
    assert servers_of(found.layers[0]) == [{"type": "inet", "host": "m", "port": "1"}], "one has no port to speak of"


def test_nobody_else_writes_the_export_that_a_guest_has() -> None:
    below, over = (disk_xml(uri).removeprefix("<disk type='network'>") for uri in (URIS[2], URIS[4]))
    below, over = below.removesuffix("</disk>"), over.removesuffix("</disk>")
    mirror = f"<mirror type='network' job='copy'>{over}</mirror>"
    backing = f"<backingStore type='network'><format type='raw'/>{below}<backingStore/></backingStore>"
    live = Live(Libvirt(), record=lambda _: None, count=lambda _: None, observe=lambda *_: None)
    live.refuse_served(URIS[0])
    domain = described(disk(URIS[0], inner=backing) + disk(URIS[1], "vdb", mirror))
    live.domains.known = lambda: [(DomainRef(UUID, "web1", active=False), domain)]  # type: ignore[method-assign]
    for uri, who in ((URIS[0], "web1/vda"), (URIS[2], "web1/vda"), (URIS[1], "web1/vdb"), (URIS[4], "web1/vdb")):
        with pytest.raises(JobError) as refused:
            live.refuse_served(uri)
        assert (refused.value.code, refused.value.field, refused.value.details["holders"]) == ("busy", "dest", [who])
    live.refuse_served(URIS[3])
    live.refuse_served(URIS[4], besides=Drive(UUID, "web1", "vdb"))
    with pytest.raises(JobError):
        live.refuse_served(URIS[1], besides=Drive(UUID, "web1", "vdb"))
