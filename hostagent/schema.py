"""The tables of the store, as steps from one version to the next. Text alone; a step that was released never changes.

Rows hold whole records as JSON (`body`), beside the columns that queries need. Triggers keep what is derived from jobs:
their labels, and how many there are in each state, so that lists and counts cost the same however many have ended.
"""

from __future__ import annotations

MIGRATIONS = (
    """
    CREATE TABLE jobs (id TEXT PRIMARY KEY, state TEXT NOT NULL, path TEXT NOT NULL, origin TEXT NOT NULL,
        created TEXT NOT NULL, finished TEXT, revocation TEXT NOT NULL, body TEXT NOT NULL);
    CREATE INDEX jobs_by_state ON jobs (state, created);
    CREATE INDEX jobs_by_created ON jobs (created, id);
    CREATE INDEX jobs_unsettled ON jobs (created) WHERE finished IS NULL OR revocation = 'pending';
    CREATE INDEX jobs_by_end ON jobs (finished) WHERE finished IS NOT NULL;
    CREATE TABLE events (seq INTEGER PRIMARY KEY AUTOINCREMENT, body TEXT NOT NULL);
    CREATE TABLE access_rows (id TEXT PRIMARY KEY, dev INTEGER NOT NULL, ino INTEGER NOT NULL, path TEXT NOT NULL,
        holder_kind TEXT NOT NULL, holder_id TEXT NOT NULL, mode TEXT NOT NULL, since TEXT NOT NULL,
        reason TEXT NOT NULL, UNIQUE (dev, ino, holder_kind, holder_id));
    CREATE INDEX access_rows_by_holder ON access_rows (holder_kind, holder_id);
    CREATE TABLE access_files (dev INTEGER NOT NULL, ino INTEGER NOT NULL, verdict TEXT NOT NULL, body TEXT NOT NULL,
        PRIMARY KEY (dev, ino));
    CREATE TABLE exports (id TEXT PRIMARY KEY, state TEXT NOT NULL, created TEXT NOT NULL, stopped TEXT,
        body TEXT NOT NULL);
    CREATE INDEX exports_by_state ON exports (state, created);
    CREATE TABLE daemons (id TEXT PRIMARY KEY, body TEXT NOT NULL);
    CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
    """,
    # A job's labels never change.
    """
    DROP INDEX jobs_by_state;
    CREATE INDEX jobs_by_state ON jobs (state, created, id);
    CREATE INDEX jobs_by_path ON jobs (path, created, id);
    CREATE INDEX exports_by_created ON exports (created, id);
    CREATE INDEX exports_by_end ON exports (stopped) WHERE stopped IS NOT NULL;
    CREATE TABLE job_labels (key TEXT NOT NULL, value TEXT NOT NULL, created TEXT NOT NULL, job TEXT NOT NULL,
        PRIMARY KEY (key, value, created, job)) WITHOUT ROWID;
    CREATE INDEX job_labels_by_job ON job_labels (job);
    CREATE TABLE job_counts (state TEXT PRIMARY KEY, jobs INTEGER NOT NULL);
    INSERT INTO job_counts SELECT state, count(*) FROM jobs GROUP BY state;
    INSERT INTO job_labels SELECT label.key, label.value, jobs.created, jobs.id
        FROM jobs, json_each(jobs.body, '$.spec.labels') AS label;
    CREATE TRIGGER job_new AFTER INSERT ON jobs BEGIN
        INSERT INTO job_labels SELECT key, value, NEW.created, NEW.id FROM json_each(NEW.body, '$.spec.labels');
        INSERT INTO job_counts VALUES (NEW.state, 1) ON CONFLICT DO UPDATE SET jobs = jobs + 1;
    END;
    CREATE TRIGGER job_moved AFTER UPDATE OF state ON jobs WHEN NEW.state != OLD.state BEGIN
        UPDATE job_counts SET jobs = jobs - 1 WHERE state = OLD.state;
        INSERT INTO job_counts VALUES (NEW.state, 1) ON CONFLICT DO UPDATE SET jobs = jobs + 1;
    END;
    CREATE TRIGGER job_gone AFTER DELETE ON jobs BEGIN
        DELETE FROM job_labels WHERE job = OLD.id;
        UPDATE job_counts SET jobs = jobs - 1 WHERE state = OLD.state;
    END;
    """,
    """
    CREATE INDEX jobs_by_group ON jobs (json_extract(body, '$.group.id'), created, id);
    """,
    # A label is "UID:GID".
    """
    ALTER TABLE access_rows ADD COLUMN label TEXT;
    ALTER TABLE access_rows ADD COLUMN name TEXT NOT NULL DEFAULT '';
    """,
    # Empty where it was not noted.
    """
    ALTER TABLE access_rows ADD COLUMN format TEXT NOT NULL DEFAULT '';
    """,
    # Which file the holder is, if it is an image: "DEV:INO".
    """
    ALTER TABLE access_rows ADD COLUMN image TEXT;
    """,
)
