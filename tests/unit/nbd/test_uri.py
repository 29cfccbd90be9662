"""NBD URIs: what they mean, when two are the same, and which servers the configuration lets in."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hostagent.config_text import load
from hostagent.drivers.qmp import Refused
from hostagent.errors import AgentError
from hostagent.nbd.network import network_layer, refused
from hostagent.nbd.uri import file_of, normal, server_of
from hostagent.nbd.uri_leases import UriLeases
from jobs.errors import JobError

UNIX = "nbd+unix:///disk?socket=/run/nbd/s"


@pytest.mark.parametrize(
    ("uri", "server", "name"),
    [
        ("nbd://store/disk", {"type": "inet", "host": "store", "port": "10809"}, "disk"),
        ("nbd://store", {"type": "inet", "host": "store", "port": "10809"}, ""),
        ("nbd://Store:10810/", {"type": "inet", "host": "store", "port": "10810"}, ""),
        ("nbd://[fe80::1]:1/a/b", {"type": "inet", "host": "fe80::1", "port": "1"}, "a/b"),
        ("nbd://h/a%20b%2Fc", {"type": "inet", "host": "h", "port": "10809"}, "a b/c"),
        (UNIX, {"type": "unix", "path": "/run/nbd/s"}, "disk"),
        ("nbd+unix://?socket=/run//./a+b%20c", {"type": "unix", "path": "/run/a+b c"}, ""),
        ("nbd+unix:///?socket=//run/s", {"type": "unix", "path": "/run/s"}, ""),
    ],
)
def test_a_uri_is_understood(uri: str, server: dict[str, str], name: str) -> None:
    assert server_of(uri) == (server, name)
    assert server_of(normal(uri)) == (server, name)
    assert normal(normal(uri)) == normal(uri)


@pytest.mark.parametrize(
    "uri",
    [
        "nbd://",
        "nbd:///disk",
        "nbd://h:port/x",
        "nbd://h:99999/x",
        "nbd://h/x?socket=/s",
        "nbd://h/x#part",
        "nbd://h/%00",
        "nbd://h/%ff",
        "nbd://h/a\nb",
        "nbd://[::1/x",
        "nbd+unix:///x",
        "nbd+unix:///x?socket=",
        "nbd+unix:///x?socket=s",
        "nbd+unix:///x?socket=/run/../s",
        "nbd+unix:///x?socket=/a%00b",
        "nbd+unix:///x?socket=/s&socket=/t",
        "nbd+unix:///x?socket=/s&tls=1",
        "nbd+unix://host/x?socket=/s",
    ],
)
def test_what_means_nothing_is_refused_rather_than_left_out(uri: str) -> None:
    with pytest.raises(JobError) as caught:
        server_of(uri, "image")
    assert (caught.value.code, caught.value.field) == ("invalid", "image")


@pytest.mark.parametrize(
    "uri", ["nbd://me:geheim@h/x", "nbd://geheim@h/x", "nbd+unix://u:geheim@/x?socket=/s", "nbd://u:geheim@[::1/x"]
)
def test_a_password_is_refused_and_never_repeated(uri: str) -> None:
    with pytest.raises(JobError) as caught:
        server_of(uri)
    error = caught.value
    assert "geheim" not in f"{error.message} {error.remedy} {error.value}"


def test_what_leads_to_one_export_is_one_file_and_nothing_else_is() -> None:
    same = ["nbd://h/x", "nbd://H/x", "nbd://h:10809/x", "nbd://h/%78"]
    assert len({file_of(uri) for uri in same}) == 1
    other = ["nbd://h/X", "nbd://h:1/x", "nbd://h/", "nbd://i/x", "nbd+unix:///x?socket=/h", "nbd+unix:///x?socket=/i"]
    assert len({file_of(uri) for uri in ["nbd://h/x", *other]}) == 1 + len(other)
    assert all(file_of(uri).network for uri in same + other)


@pytest.mark.parametrize(
    ("entry", "uri", "listed"),
    [
        ("store", "nbd://store/x", True),
        ("STORE", "nbd://store:1/x", True),
        ("store:10809", "nbd://store/x", True),
        ("store:10809", "nbd://store:1/x", False),
        ("store", "nbd://store.evil/x", False),
        ("store", "nbd://evilstore/x", False),
        ("127.0.0.1", "nbd://127.1/x", False),
        ("[::1]:7", "nbd://[::1]:7/x", True),
        ("[0::1]:7", "nbd://[0:0::1]:7/x", True),
        ("[::1]:7", "nbd://[::1]/x", False),
        ("/run/nbd", UNIX, True),
        ("/run/nbd/s", UNIX, True),
        ("/run/nb", UNIX, False),
        ("/run/nbd", "nbd://run/nbd", False),
        ("run", UNIX, False),
    ],
)
def test_only_listed_servers_are_reached(entry: str, uri: str, listed: bool) -> None:
    assert load(env={"HOSTAGENT_IMAGES_NETWORK": entry}).images.network == (entry,)
    if listed:
        assert network_layer(uri, ["other", entry]).path == normal(uri)
        return
    with pytest.raises(JobError) as caught:
        network_layer(uri, ["other", entry])
    assert caught.value.code == "denied"
    assert "images.network" in f"{caught.value.message} {caught.value.remedy}"


def test_a_link_in_a_listed_folder_does_not_lead_out_of_it(tmp_path: Path) -> None:
    (tmp_path / "listed").mkdir()
    (tmp_path / "listed" / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(JobError, match=re.escape("images.network")):
        network_layer(f"nbd+unix:///?socket={tmp_path}/listed/link", [str(tmp_path / "listed")])


def test_the_list_of_servers_is_empty_by_default_and_separated_by_commas() -> None:
    assert load(env={}).images.network == ()
    assert load(env={"HOSTAGENT_IMAGES_NETWORK": "a:1,/run/x,"}).images.network == ("a:1", "/run/x")


@pytest.mark.parametrize("entry", ["nbd://h", "h:0", "h:70000", "h/x", "u@h", "h:", "*", "[h]", "relative/path", "ä"])
def test_a_server_that_is_none_is_refused(entry: str) -> None:
    with pytest.raises(AgentError, match=re.escape("images.network")):
        load(env={"HOSTAGENT_IMAGES_NETWORK": entry})


def test_a_lease_is_shared_by_readers_and_a_writers_alone() -> None:
    leases = UriLeases(lambda file: ["export:1"])
    layer = network_layer(UNIX, ["/run"])
    one, two = leases.take(layer, exclusive=False), leases.take(layer, exclusive=False)
    with pytest.raises(JobError) as caught:
        leases.take(layer, exclusive=True)
    assert (caught.value.code, caught.value.details["holders"]) == ("busy", ["export:1"])
    with pytest.raises(JobError):
        one.exclude(ours=())
    two.release()
    two.release()
    one.exclude(ours=())
    with pytest.raises(JobError):
        leases.take(layer, exclusive=False)
    one.share(ours=())
    leases.take(layer, exclusive=False).release()
    one.release()
    leases.take(layer, exclusive=True)


@pytest.mark.parametrize(
    ("text", "code", "field"),
    [
        ("Failed to connect to '/run/nbd/s': Permission denied", "access_refused", "image"),
        ("Failed to connect to '/run/nbd/s': No such file or directory", "unavailable", "image"),
        ("Connection attempt cancelled by timeout", "unavailable", "image"),
        ("Requested export not available", "not_found", "image"),
        ("Could not open image: Permission denied", "denied", "writable"),
        ("Offset (8) cannot be greater than size of the containing file (4)", "invalid", "offset"),
        ("The sum of offset (1) and size (4) has to be smaller or equal to the  actual size", "invalid", "size"),
        ("something new", "unavailable", "image"),
    ],
)
def test_what_qemu_says_is_told_with_what_to_do(text: str, code: str, field: str) -> None:
    error = refused(UNIX, "qemu", Refused("blockdev-add", text))
    assert (error.code, error.field) == (code, field)
    assert error.remedy
