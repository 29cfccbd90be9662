from __future__ import annotations

import pytest

from hostagent.drivers.domain_claims import DomainClaims
from jobs.errors import JobError


def test_one_holder_a_domain() -> None:
    claims = DomainClaims()
    claims.claim("u1", "web1", "job 1")
    claims.claim("u1", "web1", "job 1")
    claims.claim("u2", "db1", "job 2")
    with pytest.raises(JobError) as refused:
        claims.claim("u1", "web1", "job 2")
    assert refused.value.code == "busy"
    assert refused.value.details == {"holders": ["job 1"]}
    assert "job 1" in refused.value.message and "job 1" in str(refused.value.remedy)


def test_only_the_holder_releases() -> None:
    claims = DomainClaims()
    claims.claim("u1", "web1", "job 1")
    claims.release("u1", "job 2")
    assert claims.holder("u1") == "job 1"
    claims.release("u1", "job 1")
    claims.release("u1", "job 1")
    assert claims.holder("u1") is None
    claims.claim("u1", "web1", "job 2")
