from __future__ import annotations

import time

from prometheus_client.parser import text_string_to_metric_families

from hostagent.metrics import JobGauge, Metrics, Room, Snapshot


def scraped(metrics):
    text, content_type = metrics.render()
    assert content_type.startswith("text/plain")
    return {
        (sample.name.removeprefix("hostagent_"), *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def metrics_of(**changes):
    return Metrics(lambda: Snapshot(taken=1.0, **changes), version="1")


def gauge(target="/a", state="running", cur=0):
    return JobGauge(target, "pull", state, cur=cur, end=100, bandwidth=0, stalled=0.0)


def test_a_series_lives_as_long_as_its_job():
    jobs = [gauge(cur=7)]
    metrics = Metrics(lambda: Snapshot(taken=1.0, jobs=tuple(jobs)), version="1")
    assert scraped(metrics)["block_job_cursor_bytes", "", "/a", "pull"] == 7
    jobs.clear()
    assert not [key for key in scraped(metrics) if key[0] == "block_job_cursor_bytes"]
    assert scraped(metrics)["block_jobs", "pull", "running"] == 0


def test_a_job_that_is_queued_on_the_same_disk_hides_behind_the_running_one():
    found = scraped(metrics_of(jobs=[gauge(state="queued"), gauge(cur=7)]))
    assert found["block_job_cursor_bytes", "", "/a", "pull"] == 7
    assert found["block_jobs", "pull", "queued"] == 1
    assert found["block_jobs", "pull", "running"] == 1


def test_a_path_that_is_no_utf8_or_has_a_newline_does_not_break_the_scrape():
    found = scraped(metrics_of(jobs=[gauge('/a\udcff\n"b\\')]))
    assert ("block_job_end_bytes", "", '/a\\udcff\n"b\\', "pull") in found


def test_failures_are_counted_from_zero_on():
    metrics = metrics_of()
    assert scraped(metrics)["block_jobs_finished_total", "failed", "pull"] == 0
    metrics.job_finished("pull", "failed", 3.0)
    found = scraped(metrics)
    assert found["block_jobs_finished_total", "failed", "pull"] == 1
    assert found["block_job_duration_seconds_sum", "failed", "pull"] == 3.0


def test_buckets_hold_all_that_is_at_most_their_bound():
    metrics = metrics_of()
    for lag in (0.001, 0.0011, 20.0, -1.0):
        metrics.revocation("job", "revoked")
        metrics.revocation_lag(lag)
    metrics.revocation("timer", "kept")
    found = scraped(metrics)
    bucket = "access_revocation_lag_seconds_bucket"
    assert [found[bucket, bound] for bound in ("0.001", "0.0025", "10.0", "+Inf")] == [2, 3, 3, 4]
    assert found["access_revocation_lag_seconds_count",] == 4
    assert found["access_revocations_total", "kept", "timer"] == 1


def test_the_oldest_pending_revocation_ages():
    assert scraped(metrics_of())["access_revocation_oldest_seconds",] == 0
    waited = scraped(metrics_of(oldest_pending=time.time() - 60))["access_revocation_oldest_seconds",]
    assert 60 <= waited < 70


def test_what_is_not_known_of_the_store_is_not_shown():
    unknown, known = scraped(metrics_of(min_free=5)), scraped(metrics_of(store=Room(used=3, free=7)))
    assert (known["store_bytes",], known["store_free_bytes",], unknown["store_min_free_bytes",]) == (3, 7, 5)
    assert not {("store_bytes",), ("store_free_bytes",)} & unknown.keys()


def test_every_scrape_reads_one_snapshot():
    reads = []

    def snapshot():
        reads.append(1)
        return Snapshot(taken=1.0)

    metrics = Metrics(snapshot, version="1")
    assert reads == []
    metrics.render()
    assert reads == [1]
