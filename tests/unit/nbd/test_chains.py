"""The registry of prepared chains, where storage daemons end in the middle of something."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from hostagent.nbd.chains import Chains
from hostagent.nbd.prepared import PreparedChain
from jobs.model import Chain, FileId, Layer
from jobs.ports import SystemClock

OLD, NEW = FileId(1, 1), FileId(1, 2)


class Sink:
    def __init__(self) -> None:
        self.told: list[FileId] = []

    async def moved(self, chain: PreparedChain) -> None:
        self.told.append(chain.file)


@pytest.mark.parametrize("died", [False, True])
def test_a_chain_whose_daemon_died_while_it_moved_is_not_found_again(died: bool) -> None:
    async def scenario() -> None:
        unused: Any = None
        chains = Chains(unused, unused, unused, SystemClock())
        sink = Sink()
        chains.sink = cast(Any, sink)
        layer = Layer("/top", "qcow2", OLD, 512, 0)
        chain = PreparedChain(chains, None, Chain((layer,)), shallow=False)
        chains._chains[chain.key] = chain
        if died:
            chain.died = True
            chains._chains.pop(chain.key)  # as `lost` does
        await chains.moved(chain, NEW)
        assert chains.all() == ([] if died else [chain])
        assert chains.find(NEW) is (None if died else chain)
        assert chains.find(OLD) is None
        assert sink.told == [NEW]

    asyncio.run(scenario())
