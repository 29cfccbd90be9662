"""How clients reach an export, proven before anybody is told, and who they are."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import replace

from hostagent.nbd import sockdiag, tcp, tls
from hostagent.nbd.prepared import PreparedChain
from hostagent.nbdclient import conversations
from hostagent.records import ExportRecord


async def reached(
    record: ExportRecord, chain: PreparedChain, settings: tls.TlsSettings, timeout: float
) -> ExportRecord:
    """Shake hands with the export, which has just been added; the record that says where it is."""
    daemon = chain.daemon
    assert daemon is not None
    record = replace(record, daemon=daemon.id, pid=daemon.pid, connection=chain.connection)
    listener = chain.apart.listener if chain.apart else None
    if listener is not None and daemon.port is not None:
        address = (listener.host, daemon.port)
        await asyncio.to_thread(tls.prove, address, timeout)
        return replace(record, host=listener.host, port=daemon.port, uri=tls.uri(address, record.id, settings))
    socket = str(daemon.places.socket)
    size = await asyncio.to_thread(conversations.handshake, socket, record.id, timeout)
    part = record.part._replace(size=size) if record.part else None
    return replace(record, size=size, part=part, socket=socket, uri=f"nbd+unix:///{record.id}?socket={socket}")


def clients(record: ExportRecord) -> list[sockdiag.Client]:
    """Who is connected to the export's listener. Blocking: reads the kernel's tables and /proc."""
    return clients_of([record])[record.id]


def clients_of(records: Sequence[ExportRecord]) -> dict[str, list[sockdiag.Client]]:
    """The same for many exports, at once. Those of one chain share a listener, and so its clients. Blocking."""
    sockets = {record.socket for record in records if record.active and record.socket}
    skip = {os.getpid(), *(record.pid for record in records if record.pid)}
    found = sockdiag.clients_of(sockets, skip_pids=skip) if sockets else {}
    remote = {
        record.id: tcp.clients(record.host, record.port)
        for record in records
        if record.active and record.port is not None
    }
    return {record.id: [*found.get(record.socket, ()), *remote.get(record.id, ())] for record in records}


def connections(record: ExportRecord) -> int:
    """How many they are, without the search for their names. Blocking."""
    if record.port is not None:
        return len(tcp.clients(record.host, record.port))
    return sockdiag.connections(record.socket, skip_self=True)
