-- The record in SQLite. Append-only like every migration here: a later change is a later file.
--
-- `events` is the truth, the other tables are projections that can be made again from it. The key `position` is
-- replica number * 2^44 + sequence number: one b-tree, filled at its end, instead of a rowid and an index on
-- (replica, seq). 2^44 events are 550 years at 1,000 a second; 2^19 replicas fit beside them.
--
-- Records are BLOBs, not JSON columns: their bytes are hashed, and only bytes come back unchanged.
-- Context, embedding and bodies are columns of the event's own row, after the record, so that reading records does not
-- touch them and erasing them is setting them NULL.

CREATE TABLE feed_cursor (
    number  INTEGER PRIMARY KEY,
    replica TEXT NOT NULL UNIQUE,
    seq     INTEGER NOT NULL,      -- last event taken in
    hash    BLOB NOT NULL          -- its hash: the next event has to link to it
) STRICT;

CREATE TABLE events (
    position    INTEGER PRIMARY KEY,
    kind        TEXT NOT NULL,
    decision_id BLOB,
    at          INTEGER NOT NULL,  -- microseconds since the epoch
    hash        BLOB NOT NULL,
    prev        BLOB NOT NULL,
    record      BLOB NOT NULL,
    context     BLOB,
    embedding   BLOB,
    bodies      BLOB
) STRICT;

-- A decision is shown from its records, all of them by this one index. UUIDv7 ids grow with time, so inserts land at
-- the index's end.
CREATE INDEX events_by_decision ON events (decision_id) WHERE decision_id IS NOT NULL;

-- The tables of one decision are clustered by its id: a list, newest first, is a walk from the end.
CREATE TABLE decisions (
    id              BLOB NOT NULL PRIMARY KEY,
    position        INTEGER NOT NULL,
    at              INTEGER NOT NULL,
    policy          TEXT NOT NULL,
    policy_hash     BLOB NOT NULL,
    state_seq       INTEGER NOT NULL,
    decided_by      TEXT NOT NULL,
    rule            TEXT,
    arm             TEXT NOT NULL,
    propensity      REAL NOT NULL,
    model_requested TEXT NOT NULL,
    stream          INTEGER NOT NULL,
    key             TEXT NOT NULL,
    tenant          TEXT NOT NULL,
    session         TEXT NOT NULL,
    client_retry    INTEGER NOT NULL,
    dry             INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- Most requests carry no session; those that do are looked up by it.
CREATE INDEX decisions_by_session ON decisions (session, id) WHERE session <> '';

CREATE TABLE candidates (
    decision_id BLOB NOT NULL,
    place       INTEGER NOT NULL,
    arm         TEXT NOT NULL,
    score       REAL,
    propensity  REAL NOT NULL,
    eliminated  TEXT,              -- what eliminated it: `capability: tools`
    PRIMARY KEY (decision_id, place)
) STRICT, WITHOUT ROWID;

CREATE TABLE attempts (
    decision_id       BLOB NOT NULL,
    place             INTEGER NOT NULL,
    position          INTEGER NOT NULL,
    why               TEXT NOT NULL,
    model             TEXT NOT NULL,
    model_reported    TEXT,
    backend           TEXT NOT NULL,
    started           INTEGER NOT NULL,
    ttft_us           INTEGER,
    latency_us        INTEGER NOT NULL,
    prompt_tokens     INTEGER NOT NULL,
    cached_tokens     INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    cost_usd          REAL NOT NULL,
    error             TEXT,
    PRIMARY KEY (decision_id, place)
) STRICT, WITHOUT ROWID;

CREATE TABLE outcomes (
    decision_id       BLOB NOT NULL PRIMARY KEY,
    position          INTEGER NOT NULL,
    at                INTEGER NOT NULL,
    status            TEXT NOT NULL,
    served_by         TEXT NOT NULL,
    attempts          INTEGER NOT NULL,
    cost_usd          REAL NOT NULL,
    latency_us        INTEGER NOT NULL,
    ttft_us           INTEGER,
    prompt_tokens     INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    error             TEXT
) STRICT, WITHOUT ROWID;

-- Decisions that wait for an outcome. Small at all times: a decision whose outcome comes in the same batch never gets
-- here, so that finding what a crash interrupted does not walk the whole of `decisions`.
CREATE TABLE open_decisions (
    id      BLOB NOT NULL PRIMARY KEY,
    replica INTEGER NOT NULL,
    at      INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE feedback (
    position        INTEGER PRIMARY KEY,
    decision_id     BLOB NOT NULL,
    at              INTEGER NOT NULL,
    source          TEXT NOT NULL,
    name            TEXT NOT NULL,
    value           REAL NOT NULL,
    idempotency_key TEXT
) STRICT;

CREATE INDEX feedback_by_decision ON feedback (decision_id);

-- The learner folds a policy's updates in this order.
CREATE TABLE state_updates (
    policy_hash BLOB NOT NULL,
    seq         INTEGER NOT NULL,
    position    INTEGER NOT NULL,
    decision_id BLOB,
    arm         TEXT NOT NULL,
    reward      REAL NOT NULL,
    propensity  REAL NOT NULL,
    decided     INTEGER NOT NULL,
    PRIMARY KEY (policy_hash, seq)
) STRICT, WITHOUT ROWID;

-- `verify` compares a stretch of events with its projections; the other tables are found by the decision's id.
CREATE INDEX state_updates_by_event ON state_updates (position);

-- At its start the learner looks for feedback that has taught nothing yet.
CREATE INDEX state_updates_by_decision ON state_updates (decision_id);

-- The same version is recorded again at every start; the first record of it stays.
CREATE TABLE policy_versions (
    hash     BLOB NOT NULL PRIMARY KEY,
    position INTEGER NOT NULL,
    at       INTEGER NOT NULL,
    name     TEXT NOT NULL,
    file     TEXT NOT NULL
) STRICT, WITHOUT ROWID;

-- Not part of the record: a state is a fold over `state_updates`, and a snapshot only shortens the fold.
CREATE TABLE snapshots (
    policy_hash BLOB NOT NULL,
    state_seq   INTEGER NOT NULL,
    bytes       BLOB NOT NULL,
    PRIMARY KEY (policy_hash, state_seq)
) STRICT, WITHOUT ROWID;
