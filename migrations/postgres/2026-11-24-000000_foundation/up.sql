-- The whole schema, also what later versions fill; the same tables and columns as for SQLite. Times are milliseconds
-- since 1970 UTC; ids are time-ordered 63-bit integers made by the application (59 bits for devices), the same on both
-- stores. `app` leads every natural key.
-- `notification`, `outcome_block` and `attempt_detail` are partitioned by their time-ordered id; partitions are made
-- ahead and dropped by retention, the default partition catches what falls outside.
-- No foreign keys: erasure deletes people while packed history keeps only their ids, and retention drops history by time.

-- Keys of the installation (identity key, later sealing keys and provider tokens).
CREATE TABLE secret (
    name TEXT NOT NULL PRIMARY KEY,
    value BYTEA NOT NULL,
    created_at BIGINT NOT NULL
);

CREATE TABLE app (
    id BIGINT NOT NULL PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    created_at BIGINT NOT NULL
);

-- Ids are never reused: packed data outlive a person and must not point at another.
CREATE TABLE app_user (
    id BIGINT NOT NULL PRIMARY KEY,
    app BIGINT NOT NULL,
    external_id TEXT NOT NULL,
    time_zone TEXT,
    time_zone_at BIGINT,
    locale TEXT,
    badge INTEGER,
    created_at BIGINT NOT NULL
);
CREATE UNIQUE INDEX app_user_by_name ON app_user (app, external_id) INCLUDE (id);
-- Fan-out to everyone pages by this.
CREATE INDEX app_user_by_app ON app_user (app, id);

-- app × platform (or plug-in) × credential × environment × bundle.
CREATE TABLE route (
    id BIGINT NOT NULL PRIMARY KEY,
    app BIGINT NOT NULL,
    platform SMALLINT NOT NULL,
    plugin TEXT NOT NULL DEFAULT '',
    credential TEXT NOT NULL,
    environment SMALLINT NOT NULL,
    bundle TEXT NOT NULL
);
CREATE UNIQUE INDEX route_by_spec ON route (app, platform, plugin, credential, environment, bundle);

-- A row never changes its user. state: 1 active, 2 retired, 3 moved.
CREATE TABLE device (
    id BIGINT NOT NULL PRIMARY KEY,
    app BIGINT NOT NULL,
    platform SMALLINT NOT NULL,
    plugin TEXT NOT NULL DEFAULT '',
    user_key BIGINT NOT NULL,
    route BIGINT NOT NULL,
    kind SMALLINT NOT NULL,
    installation_id TEXT,
    token_hash BYTEA NOT NULL CHECK (octet_length(token_hash) = 16),
    token_sealed BYTEA NOT NULL,
    seal_key SMALLINT NOT NULL DEFAULT 0,
    locale TEXT,
    time_zone TEXT,
    app_version TEXT,
    os_version TEXT,
    permission SMALLINT NOT NULL DEFAULT 0,
    labels TEXT NOT NULL DEFAULT '{}',
    -- Whether any device-level row in opt_in exists: spares the look-up for the many that have none.
    has_choice SMALLINT NOT NULL DEFAULT 0,
    observed_at BIGINT NOT NULL,
    confirmed_at BIGINT NOT NULL,
    -- The platform asked to leave it alone until then.
    hold_until BIGINT,
    -- When a platform called the token gone while a repeated registration was not yet written: asked once more.
    doubted_at BIGINT,
    state SMALLINT NOT NULL CHECK (state IN (1, 2, 3)),
    retired_reason TEXT,
    retired_at BIGINT,
    created_at BIGINT NOT NULL
);
-- Statements that look by another key say `state + 0 = 1`: a plan made for few rows would walk this one whole.
CREATE UNIQUE INDEX device_by_token ON device (app, platform, plugin, token_hash) WHERE state = 1;
-- The newest row of a token that is not active: a token that registers again comes back to life.
CREATE INDEX device_by_old_token ON device (app, platform, plugin, token_hash, id) WHERE state <> 1;
-- One row an app install: a new token of the same install takes its place.
CREATE INDEX device_by_installation ON device (app, installation_id) WHERE state = 1 AND installation_id IS NOT NULL;
CREATE INDEX device_by_user ON device (user_key, id);
CREATE INDEX device_by_hold ON device (hold_until) WHERE hold_until IS NOT NULL;

-- device 0: the user's own choice. event_type '': the master switch, or everything on that device.
CREATE TABLE opt_in (
    user_key BIGINT NOT NULL,
    device BIGINT NOT NULL DEFAULT 0,
    event_type TEXT NOT NULL DEFAULT '',
    app BIGINT NOT NULL,
    opted_in SMALLINT NOT NULL CHECK (opted_in IN (0, 1)),
    observed_at BIGINT NOT NULL,
    recorded_at BIGINT NOT NULL,
    source TEXT,
    policy_version TEXT,
    evidence TEXT,
    -- With the answer, so that the gates need not come to the row.
    PRIMARY KEY (user_key, device, event_type) INCLUDE (opted_in)
);

-- Every change ever asked for, also those that lost to a later one (applied 0). Outlives other retention as proof.
CREATE TABLE opt_in_history (
    id BIGINT NOT NULL PRIMARY KEY,
    app BIGINT NOT NULL,
    user_key BIGINT NOT NULL,
    device BIGINT NOT NULL,
    event_type TEXT NOT NULL,
    opted_in SMALLINT NOT NULL,
    applied SMALLINT NOT NULL,
    observed_at BIGINT NOT NULL,
    recorded_at BIGINT NOT NULL,
    caller TEXT,
    source TEXT,
    policy_version TEXT,
    evidence TEXT
);
CREATE INDEX opt_in_history_by_user ON opt_in_history (user_key, id);

CREATE TABLE topic (
    id BIGINT NOT NULL PRIMARY KEY,
    app BIGINT NOT NULL,
    name TEXT NOT NULL
);
CREATE UNIQUE INDEX topic_by_name ON topic (app, name);

-- active 0 is a tombstone: a late retry of Subscribe must not undo a later Unsubscribe. The primary key is the order
-- in which a fan-out pages.
CREATE TABLE subscription (
    topic BIGINT NOT NULL,
    user_key BIGINT NOT NULL,
    active SMALLINT NOT NULL,
    observed_at BIGINT NOT NULL,
    recorded_at BIGINT NOT NULL,
    PRIMARY KEY (topic, user_key)
);
CREATE INDEX subscription_by_user ON subscription (user_key, topic) WHERE active = 1;

-- kind: 1 a subject or topic is muted, 2 an actor is blocked.
CREATE TABLE mute (
    user_key BIGINT NOT NULL,
    kind SMALLINT NOT NULL,
    name TEXT NOT NULL,
    app BIGINT NOT NULL,
    active SMALLINT NOT NULL,
    until BIGINT,
    observed_at BIGINT NOT NULL,
    recorded_at BIGINT NOT NULL,
    PRIMARY KEY (user_key, kind, name)
);

CREATE TABLE quiet_hours (
    user_key BIGINT NOT NULL PRIMARY KEY,
    app BIGINT NOT NULL,
    windows TEXT NOT NULL,
    observed_at BIGINT NOT NULL,
    recorded_at BIGINT NOT NULL
);

CREATE TABLE event_type_version (
    id BIGINT NOT NULL PRIMARY KEY,
    app BIGINT NOT NULL,
    name TEXT NOT NULL,
    version BIGINT NOT NULL,
    definition TEXT NOT NULL,
    deleted_at BIGINT,
    created_at BIGINT NOT NULL
);
CREATE UNIQUE INDEX event_type_by_name ON event_type_version (app, name, version);

-- Written once; only a cancel sets cancelled_at. The public id is derived from id.
CREATE TABLE notification (
    id BIGINT NOT NULL PRIMARY KEY,
    app BIGINT NOT NULL,
    event_type TEXT NOT NULL,
    type_version BIGINT,
    default_opt_in SMALLINT NOT NULL,
    lane SMALLINT NOT NULL,
    priority SMALLINT NOT NULL,
    collapse_key TEXT,
    actor BIGINT,
    subject TEXT,
    -- JSON: content, data, labels.
    content TEXT NOT NULL,
    event_at BIGINT NOT NULL,
    accepted_at BIGINT NOT NULL,
    not_before BIGINT,
    expires_at BIGINT NOT NULL,
    cancelled_at BIGINT,
    -- Distinct people when that was counted, else null (a fan-out).
    people BIGINT,
    -- Which APNs or FCM outcome of "maybe sent" ends it: 0 retry, 1 drop.
    on_maybe SMALLINT NOT NULL DEFAULT 0
) PARTITION BY RANGE (id);
CREATE TABLE notification_default PARTITION OF notification DEFAULT;
CREATE INDEX notification_by_app ON notification (app, id);

CREATE TABLE idempotency (
    app BIGINT NOT NULL,
    key TEXT NOT NULL,
    hash_version SMALLINT NOT NULL,
    hash BYTEA NOT NULL,
    notification_id BIGINT NOT NULL,
    expires_at BIGINT NOT NULL,
    PRIMARY KEY (app, key)
);
CREATE INDEX idempotency_by_expiry ON idempotency (expires_at);

-- Frequency caps and digests, decided once per (notification, user_key).
CREATE TABLE user_counter (
    user_key BIGINT NOT NULL,
    name TEXT NOT NULL,
    app BIGINT NOT NULL,
    count BIGINT NOT NULL,
    window_start BIGINT NOT NULL,
    notification_id BIGINT,
    PRIMARY KEY (user_key, name)
);

-- Open expansions only. audience: packed topics, named people and devices. cursor: the last user expanded.
CREATE TABLE fanout (
    notification_id BIGINT NOT NULL PRIMARY KEY,
    app BIGINT NOT NULL,
    audience BYTEA NOT NULL,
    cursor BIGINT NOT NULL DEFAULT 0,
    owner BIGINT NOT NULL DEFAULT 0,
    fence BIGINT NOT NULL DEFAULT 0,
    due_at BIGINT NOT NULL
);
CREATE INDEX fanout_by_due ON fanout (due_at);

-- OPEN WORK ONLY: a row is deleted when its job is finished. owner 0: free.
CREATE TABLE job (
    id BIGINT NOT NULL PRIMARY KEY,
    app BIGINT NOT NULL,
    notification_id BIGINT NOT NULL,
    route BIGINT NOT NULL,
    lane SMALLINT NOT NULL,
    format SMALLINT NOT NULL,
    ready_at BIGINT NOT NULL,
    due_at BIGINT NOT NULL,
    owner BIGINT NOT NULL DEFAULT 0,
    fence BIGINT NOT NULL DEFAULT 0,
    attempt INTEGER NOT NULL DEFAULT 0,
    claims INTEGER NOT NULL DEFAULT 0,
    first_attempt_at BIGINT,
    first_user BIGINT NOT NULL,
    last_user BIGINT NOT NULL,
    target_count INTEGER NOT NULL,
    targets BYTEA NOT NULL,
    -- Optional per-target columns of later formats (badge, digest count).
    extra BYTEA,
    progress BYTEA
);
-- The claim: free jobs of a route and lane, earliest due first.
ALTER TABLE job ALTER COLUMN targets SET STORAGE EXTERNAL;
-- Emptied it keeps its pages: of a table without any the planner believes that reading the whole is as cheap as a look-up.
ALTER TABLE job SET (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0,
    vacuum_truncate = false);
CREATE INDEX job_by_due ON job (route, lane, due_at) WHERE owner = 0;
CREATE INDEX job_by_owner ON job (owner) WHERE owner <> 0;
CREATE INDEX job_by_notification ON job (notification_id, first_user);

-- Append-only history. route null: written at planning. The last block that names a target is its state.
-- xid: the transaction that wrote it. Ids are made before commits, so their order is not the order of commits.
CREATE TABLE outcome_block (
    id BIGINT NOT NULL PRIMARY KEY,
    app BIGINT NOT NULL,
    notification_id BIGINT NOT NULL,
    route BIGINT,
    first_user BIGINT NOT NULL,
    last_user BIGINT NOT NULL,
    at BIGINT NOT NULL,
    xid BIGINT NOT NULL DEFAULT (pg_current_xact_id()::TEXT::BIGINT),
    entries BYTEA NOT NULL
) PARTITION BY RANGE (id);
CREATE TABLE outcome_block_default PARTITION OF outcome_block DEFAULT;
-- One person of one notification in a few rows.
CREATE INDEX outcome_block_by_notification ON outcome_block (notification_id, first_user);
-- Watchers read in the order of transactions.
CREATE INDEX outcome_block_by_commit ON outcome_block (app, xid, id);

-- Devices that stopped being active, for watchers; goes with the history. xid as in outcome_block.
CREATE TABLE device_retirement (
    id BIGINT NOT NULL PRIMARY KEY,
    app BIGINT NOT NULL,
    device BIGINT NOT NULL,
    user_key BIGINT NOT NULL,
    reason TEXT NOT NULL,
    at BIGINT NOT NULL,
    xid BIGINT NOT NULL DEFAULT (pg_current_xact_id()::TEXT::BIGINT)
);
CREATE INDEX device_retirement_by_commit ON device_retirement (app, xid, id);

-- What watchers must know of the history as a whole; see the watching module.
CREATE TABLE watermark (
    name TEXT NOT NULL PRIMARY KEY,
    value BIGINT NOT NULL
);

-- Rows for failures and retries only.
CREATE TABLE attempt_detail (
    id BIGINT NOT NULL PRIMARY KEY,
    app BIGINT NOT NULL,
    notification_id BIGINT NOT NULL,
    user_key BIGINT NOT NULL,
    device BIGINT NOT NULL,
    attempt INTEGER NOT NULL,
    at BIGINT NOT NULL,
    code SMALLINT NOT NULL,
    status INTEGER NOT NULL,
    reason TEXT NOT NULL,
    next_at BIGINT
) PARTITION BY RANGE (id);
CREATE TABLE attempt_detail_default PARTITION OF attempt_detail DEFAULT;
CREATE INDEX attempt_detail_by_user ON attempt_detail (notification_id, user_key, id);

-- A node number is cell and replica slot; leased so that ids never collide.
CREATE TABLE replica (
    slot INTEGER NOT NULL PRIMARY KEY,
    boot_id BIGINT NOT NULL,
    heartbeat BIGINT NOT NULL,
    routes TEXT NOT NULL DEFAULT '[]',
    version TEXT NOT NULL DEFAULT '',
    -- The newest pack format it reads.
    pack_format SMALLINT NOT NULL DEFAULT 1
);

-- Rates that replicas share: one credential's token bucket. `granted` answers the statement that wrote it.
CREATE TABLE pace (
    name TEXT NOT NULL PRIMARY KEY,
    permits DOUBLE PRECISION NOT NULL,
    ramp_from BIGINT NOT NULL,
    at BIGINT NOT NULL,
    granted INTEGER NOT NULL
);

-- What a platform refuses, by credential or route, as a replica met it; and until when an operator lets tokens be retired
-- all the same.
CREATE TABLE provider_trouble (
    name TEXT NOT NULL PRIMARY KEY,
    cause SMALLINT NOT NULL,
    reason TEXT NOT NULL,
    since BIGINT NOT NULL,
    seen_at BIGINT NOT NULL,
    confirmed_until BIGINT
);

-- Append-only "no" log per app with a cursor, for replicas; a single process uses the in-memory feed.
CREATE TABLE deny (
    id BIGINT NOT NULL PRIMARY KEY,
    app BIGINT NOT NULL,
    kind SMALLINT NOT NULL,
    subject BIGINT NOT NULL,
    at BIGINT NOT NULL
);
CREATE INDEX deny_by_time ON deny (at);

-- Pauses of an app, event type, platform or everything; held work waits until its TTL.
CREATE TABLE pause (
    name TEXT NOT NULL PRIMARY KEY,
    since BIGINT NOT NULL,
    reason TEXT NOT NULL
);

-- Restores from a backup: nothing is sent while one is not confirmed. Each name acts once.
CREATE TABLE restoration (
    name TEXT NOT NULL PRIMARY KEY,
    since BIGINT NOT NULL,
    confirmed_at BIGINT
);

-- Resumable imports.
CREATE TABLE import_progress (
    app BIGINT NOT NULL,
    name TEXT NOT NULL,
    position BIGINT NOT NULL,
    updated_at BIGINT NOT NULL,
    PRIMARY KEY (app, name)
);
