-- The shared outbox, version 1. `{first}` comes from this database's number among all databases of
-- the outbox: sequences advance by 64 and start at the number, so that a value is unique
-- among all databases and rows can move between them.

CREATE TABLE settings (
    name text PRIMARY KEY,
    value bytea NOT NULL
);

CREATE SEQUENCE capture_seq AS int8 INCREMENT 64 MINVALUE 0 START {first} CACHE 1;
CREATE SEQUENCE dead_letter_seq AS int8 INCREMENT 64 MINVALUE 0 START {first} CACHE 1;
CREATE SEQUENCE integration_seq AS int8 INCREMENT 64 MINVALUE 0 START {first} CACHE 1;
CREATE SEQUENCE receipt_seq AS int8 INCREMENT 64 MINVALUE 0 START {first} CACHE 1;

-- One row per name, kept after a deletion: what is stored under its key may outlive it.
CREATE TABLE integrations (
    key int8 PRIMARY KEY DEFAULT nextval('integration_seq'),
    integration_id text NOT NULL UNIQUE,
    -- active: takes captures; leaving: for another database; arriving: from another one;
    -- moved: left.
    state text NOT NULL DEFAULT 'active'
        CHECK (state IN ('active', 'leaving', 'arriving', 'moved')),
    -- Hash of the etag; 0 where there is no specification.
    revision int8 NOT NULL DEFAULT 0,
    etag text,
    -- The sealed specification; NULL after a deletion.
    spec bytea
);

-- Counts up with every change of an integration.
CREATE TABLE integration_changes (count int8 NOT NULL);
INSERT INTO integration_changes (count) VALUES (0);

-- The newest configuration file of the relays: its version and its blinded digest.
CREATE TABLE configuration (version int8 NOT NULL, digest uuid);
INSERT INTO configuration (version) VALUES (-1);

-- lane = key * 8 + region * 4 + shard. One holder sends the events of a lane; each lease and
-- settlement names its fence.
CREATE TABLE lanes (
    lane int8 PRIMARY KEY,
    holder int8,
    fence int8 NOT NULL DEFAULT 0,
    expires timestamptz,
    -- A request with events of this lane may be under way.
    busy boolean NOT NULL DEFAULT false,
    -- No lease begins before this time: an erasure or a move is under way.
    blocked_until timestamptz
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);

-- What is remembered of each capture, without its payload.
CREATE TABLE captures (
    seq int8 PRIMARY KEY DEFAULT nextval('capture_seq'),
    integration int8 NOT NULL,
    lane int8 NOT NULL,
    -- First half of SHA-256 of capture_id.
    id uuid NOT NULL,
    -- Blinded fingerprint of the content.
    digest uuid NOT NULL,
    -- Blinded user id; NULL without an address and after an erasure.
    subject int8,
    mapping_version int8 NOT NULL,
    accept_millis int8 NOT NULL,
    queue_millis int8 NOT NULL,
    stored_at timestamptz NOT NULL DEFAULT now(),
    capture_id text NOT NULL,
    -- Status of each event: protobuf, StoredEvent in record.rs. Byte 1 is the state.
    identify bytea NOT NULL,
    track bytea NOT NULL,
    -- The attempts, StoredCapture in record.rs.
    attempts bytea,
    trace bytea
-- Room in each page for the status that its rows get when they are delivered: an update
-- then touches no index.
) WITH (fillfactor = 45, autovacuum_vacuum_scale_factor = 0.02,
        autovacuum_vacuum_insert_scale_factor = 0.05);
CREATE UNIQUE INDEX captures_id ON captures (integration, id);
CREATE INDEX captures_subject ON captures (subject) WHERE subject IS NOT NULL;

-- Payloads that wait, in the order of delivery: (lane, replayed, seq).
CREATE TABLE queue (
    lane int8 NOT NULL,
    replayed boolean NOT NULL,
    seq int8 NOT NULL,
    identify_bytes int4 NOT NULL,
    track_bytes int4 NOT NULL,
    identify bytea,
    track bytea,
    PRIMARY KEY (lane, replayed, seq)
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 20000,
        autovacuum_vacuum_insert_threshold = -1);
ALTER TABLE queue ALTER identify SET STORAGE EXTERNAL, ALTER track SET STORAGE EXTERNAL;

CREATE TABLE dead_letters (
    id int8 PRIMARY KEY DEFAULT nextval('dead_letter_seq'),
    integration int8 NOT NULL,
    seq int8 NOT NULL,
    -- 1 identify, 2 track.
    event int2 NOT NULL,
    reason int4 NOT NULL,
    dead_millis int8 NOT NULL,
    accept_millis int8 NOT NULL,
    bytes int4 NOT NULL,
    payload bytea NOT NULL
);
ALTER TABLE dead_letters ALTER payload SET STORAGE EXTERNAL;
CREATE INDEX dead_letters_integration ON dead_letters (integration, id);
CREATE UNIQUE INDEX dead_letters_capture ON dead_letters (seq, event);

-- Waiting events and bytes: the sum of an integration's rows counts. They change in the
-- transaction that changes the queue. Each relay has its own rows, and so have its
-- committer (slot 0), its lanes (1 to 8) and all else (9): transactions do not wait for
-- each other's row until they are committed.
CREATE TABLE backlog (
    integration int8 NOT NULL,
    relay int8 NOT NULL,
    slot int2 NOT NULL,
    events int8 NOT NULL,
    bytes int8 NOT NULL,
    PRIMARY KEY (integration, relay, slot)
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);

-- The relays that are alive.
CREATE TABLE relays (
    relay int8 PRIMARY KEY,
    expires timestamptz NOT NULL,
    -- Whether callers or watchers wait there for changes that other relays make.
    listens boolean NOT NULL DEFAULT false
) WITH (fillfactor = 50);

CREATE TABLE receipts (
    id int8 PRIMARY KEY DEFAULT nextval('receipt_seq'),
    receipt bytea NOT NULL
);

CREATE TABLE notices (
    position int8 PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    id text NOT NULL UNIQUE,
    millis int8 NOT NULL,
    body bytea NOT NULL
);

-- For people: what became of each capture.
CREATE VIEW deliveries AS
SELECT i.integration_id, c.capture_id, c.seq,
    CASE WHEN c.lane & 4 = 0 THEN 'non-EU' ELSE 'EU' END AS data_region,
    to_timestamp(c.accept_millis / 1000.0) AS accept_time,
    (ARRAY['QUEUED', 'RETRYING', 'DELIVERED', 'SKIPPED', 'DEAD_LETTERED'])
        [get_byte(c.identify, 1)] AS identify,
    (ARRAY['QUEUED', 'RETRYING', 'DELIVERED', 'SKIPPED', 'DEAD_LETTERED'])
        [get_byte(c.track, 1)] AS track
FROM captures c JOIN integrations i ON i.key = c.integration;
