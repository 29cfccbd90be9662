"""What an address on the command line means, and what a URI says; and who is read from the kernel's tables."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from hostagent.drivers.tls import TlsListener
from hostagent.nbd import tcp, tls
from jobs.errors import JobError


@pytest.fixture
def settings(tmp_path: Path) -> tls.TlsSettings:
    (tmp_path / "keys.psk").touch()
    return tls.TlsSettings("127.0.0.1", Path(), tmp_path, Path(), "host1")


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("auto", "127.0.0.1", 0),
        ("10809", "127.0.0.1", 10809),
        ("192.0.2.1:auto", "192.0.2.1", 0),
        ("0.0.0.0:1", "0.0.0.0", 1),
        ("[::1]:65535", "::1", 65535),
    ],
)
def test_an_address_is_understood(settings: tls.TlsSettings, text: str, host: str, port: int) -> None:
    found = tls.listener(text, "psk", settings)
    assert found is not None
    assert (found.host, found.port, found.kind, found.folder) == (host, port, "psk", settings.psk_dir)


@pytest.mark.parametrize("text", ["", ":", ":1", "0", "-1", "65536", "a:b", "1:", "[::1]", "¹"])
def test_what_is_no_address_is_refused(settings: tls.TlsSettings, text: str) -> None:
    with pytest.raises(JobError) as caught:
        tls.listener(text, "psk", settings)
    assert (caught.value.code, caught.value.field) == ("invalid", "tcp")


def test_a_unix_socket_needs_nothing(settings: tls.TlsSettings) -> None:
    assert tls.listener(None, None, settings) is None


@pytest.mark.parametrize(
    ("host", "uri"),
    [
        ("192.0.2.1", "nbds://192.0.2.1:7/x"),
        ("::1", "nbds://[::1]:7/x"),
        ("0.0.0.0", "nbds://host1:7/x"),
        ("::", "nbds://host1:7/x"),
    ],
)
def test_a_uri_is_what_clients_can_use(settings: tls.TlsSettings, host: str, uri: str) -> None:
    assert tls.uri((host, 7), "x", settings) == uri


def test_a_path_with_commas_stays_one_option() -> None:
    listener = TlsListener("::1", 1, "x509", Path("/a,b"), names=("CN=a,O=b",))
    assert "dir=/a,,b," in listener.options()[1]
    assert '"match": "CN=a,O=b"' in listener.options()[3]


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_clients_of_a_port_are_its_accepted_connections(address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as listener, socket.socket(family) as client:
        try:
            listener.bind((address, 0))
        except OSError:
            pytest.skip("no IPv6 here")
        listener.listen(1)
        port = listener.getsockname()[1]
        assert tcp.clients(address, port) == []
        client.connect((address, port))
        with listener.accept()[0]:
            shown = f"[{address}]" if ":" in address else address
            expected = [f"{shown}:{client.getsockname()[1]}"]
            for host in (address, "::" if ":" in address else "0.0.0.0"):
                assert [one.name for one in tcp.clients(host, port)] == expected
            assert tcp.clients("192.0.2.1", port) == []


def test_a_server_that_talks_without_tls_is_no_proof(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        with pytest.raises(JobError) as caught:
            tls.prove(listener.getsockname()[:2], 0.1)
    assert caught.value.code == "unavailable"
