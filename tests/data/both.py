"""Which daemon a test runs against: ours always, the original where the test says what both do."""

from __future__ import annotations

import pytest

from tests.data.daemons import Imageio, Ours

OURS = pytest.param(Ours, id="ours")
THEIRS = pytest.param(Imageio, id="imageio", marks=pytest.mark.slow)
"""The original, to prove that a test describes the dialect and not only what we made of it."""
only_ours = pytest.mark.parametrize("daemon", [OURS], indirect=True)
"""What the original has not, or does wrongly in a way that is not worth a row."""
