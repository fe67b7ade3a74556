-- The record in PostgreSQL. Append-only like every migration here: a later change is a later file.
--
-- `events` is the truth, the other tables are projections that can be made again from it. Records are bytea, not jsonb:
-- their bytes are hashed, and jsonb reorders keys, rewrites numbers and refuses U+0000. `decisions.body` is a jsonb
-- projection for people with psql; weir never reads it.
--
-- What belongs to one decision is range-partitioned by the decision's id: UUIDv7 ids begin with their time, so a month
-- is a range of ids, old months can be detached or dropped whole, and every look-up by id goes to one partition. The
-- feeder makes a month's partitions when its first decision comes; ids that are no UUIDv7 go to the default partition.

CREATE TABLE feed_cursor (
    replica text PRIMARY KEY,
    seq     bigint NOT NULL,      -- last event taken in
    hash    bytea NOT NULL        -- its hash: the next event has to link to it
);

CREATE TABLE events (
    replica     text NOT NULL,
    seq         bigint NOT NULL,
    kind        text NOT NULL,
    decision_id uuid,
    at          timestamptz NOT NULL,
    hash        bytea NOT NULL,
    prev        bytea NOT NULL,
    record      bytea NOT NULL,
    context     bytea,
    embedding   bytea,
    bodies      bytea,
    PRIMARY KEY (replica, seq)
);

CREATE INDEX events_by_decision ON events (decision_id) WHERE decision_id IS NOT NULL;

-- Embeddings do not compress; trying costs time for every row.
ALTER TABLE events ALTER COLUMN embedding SET STORAGE EXTERNAL;

CREATE TABLE decisions (
    id              uuid NOT NULL PRIMARY KEY,
    replica         text NOT NULL,
    seq             bigint NOT NULL,
    at              timestamptz NOT NULL,
    policy          text NOT NULL,
    policy_hash     bytea NOT NULL,
    state_seq       bigint NOT NULL,
    decided_by      text NOT NULL,
    rule            text,
    arm             text NOT NULL,
    propensity      double precision NOT NULL,
    model_requested text NOT NULL,
    stream          boolean NOT NULL,
    key             text NOT NULL,
    tenant          text NOT NULL,
    session         text NOT NULL,
    client_retry    bigint NOT NULL,
    dry             boolean NOT NULL,
    body            jsonb NOT NULL
) PARTITION BY RANGE (id);

CREATE INDEX decisions_by_session ON decisions (session, id) WHERE session <> '';

CREATE TABLE candidates (
    decision_id uuid NOT NULL,
    place       bigint NOT NULL,
    arm         text NOT NULL,
    score       double precision,
    propensity  double precision NOT NULL,
    eliminated  text,
    PRIMARY KEY (decision_id, place)
) PARTITION BY RANGE (decision_id);

CREATE TABLE attempts (
    decision_id       uuid NOT NULL,
    place             bigint NOT NULL,
    replica           text NOT NULL,
    seq               bigint NOT NULL,
    why               text NOT NULL,
    model             text NOT NULL,
    model_reported    text,
    backend           text NOT NULL,
    started           timestamptz NOT NULL,
    ttft_us           bigint,
    latency_us        bigint NOT NULL,
    prompt_tokens     bigint NOT NULL,
    cached_tokens     bigint NOT NULL,
    completion_tokens bigint NOT NULL,
    cost_usd          double precision NOT NULL,
    error             text,
    PRIMARY KEY (decision_id, place)
) PARTITION BY RANGE (decision_id);

CREATE TABLE outcomes (
    decision_id       uuid NOT NULL PRIMARY KEY,
    replica           text NOT NULL,
    seq               bigint NOT NULL,
    at                timestamptz NOT NULL,
    status            text NOT NULL,
    served_by         text NOT NULL,
    attempts          bigint NOT NULL,
    cost_usd          double precision NOT NULL,
    latency_us        bigint NOT NULL,
    ttft_us           bigint,
    prompt_tokens     bigint NOT NULL,
    completion_tokens bigint NOT NULL,
    error             text
) PARTITION BY RANGE (decision_id);

CREATE TABLE decisions_other  PARTITION OF decisions  DEFAULT;
CREATE TABLE candidates_other PARTITION OF candidates DEFAULT;
CREATE TABLE attempts_other   PARTITION OF attempts   DEFAULT;
CREATE TABLE outcomes_other   PARTITION OF outcomes   DEFAULT;

-- Makes the partitions of one month ('2026_11') for ids from `first` up to but without `past`. A name is the only
-- thing here that cannot be a parameter, hence a function in the database and no SQL put together in the program.
-- The lock keeps two weirs that meet a new month at the same time from both making it.
CREATE FUNCTION weir_make_month(month text, first uuid, past uuid) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    parent text;
BEGIN
    IF to_regclass(format('%I', 'decisions_' || month)) IS NOT NULL THEN
        RETURN;
    END IF;
    PERFORM pg_advisory_xact_lock(hashtext('weir_make_month'));
    FOREACH parent IN ARRAY ARRAY['decisions', 'candidates', 'attempts', 'outcomes'] LOOP
        EXECUTE format('CREATE TABLE IF NOT EXISTS %I PARTITION OF %I FOR VALUES FROM (%L) TO (%L)',
                       parent || '_' || month, parent, first, past);
    END LOOP;
END
$$;

-- Decisions that wait for an outcome. Small at all times: a decision whose outcome comes in the same batch never gets
-- here, so that finding what a crash interrupted does not walk the whole of `decisions`.
CREATE TABLE open_decisions (
    id      uuid PRIMARY KEY,
    replica text NOT NULL,
    at      timestamptz NOT NULL
);

CREATE TABLE feedback (
    replica         text NOT NULL,
    seq             bigint NOT NULL,
    decision_id     uuid NOT NULL,
    at              timestamptz NOT NULL,
    source          text NOT NULL,
    name            text NOT NULL,
    value           double precision NOT NULL,
    idempotency_key text,
    PRIMARY KEY (replica, seq)
);

CREATE INDEX feedback_by_decision ON feedback (decision_id);

-- The learner folds a policy's updates in this order.
CREATE TABLE state_updates (
    policy_hash bytea NOT NULL,
    seq         bigint NOT NULL,
    replica     text NOT NULL,
    event_seq   bigint NOT NULL,
    decision_id uuid,
    arm         text NOT NULL,
    reward      double precision NOT NULL,
    propensity  double precision NOT NULL,
    decided     timestamptz NOT NULL,
    PRIMARY KEY (policy_hash, seq)
);

-- `verify` compares a stretch of events with its projections; the other tables are found by the decision's id.
CREATE INDEX state_updates_by_event ON state_updates (replica, event_seq);

-- At its start the learner looks for feedback that has taught nothing yet.
CREATE INDEX state_updates_by_decision ON state_updates (decision_id);

-- The same version is recorded again at every start; the first record of it stays.
CREATE TABLE policy_versions (
    hash    bytea PRIMARY KEY,
    replica text NOT NULL,
    seq     bigint NOT NULL,
    at      timestamptz NOT NULL,
    name    text NOT NULL,
    file    text NOT NULL
);

-- Not part of the record: a state is a fold over `state_updates`, and a snapshot only shortens the fold.
CREATE TABLE snapshots (
    policy_hash bytea NOT NULL,
    state_seq   bigint NOT NULL,
    bytes       bytea NOT NULL,
    PRIMARY KEY (policy_hash, state_seq)
);
