-- Jobs that are handed over as their events are accepted, a row for each group of events instead of one for each job (see
-- storage/postgres/handed.rs). An array for each column of a job; what is not here is as in its notification.
CREATE TABLE handed (
    id BIGINT NOT NULL PRIMARY KEY,
    owner BIGINT NOT NULL,
    format SMALLINT NOT NULL,
    job BIGINT[] NOT NULL,
    notification BIGINT[] NOT NULL,
    route BIGINT[] NOT NULL,
    first_user BIGINT[] NOT NULL,
    last_user BIGINT[] NOT NULL,
    target_count INTEGER[] NOT NULL,
    targets BYTEA[] NOT NULL
);
-- Written once, read by hardly anybody, and gone: not worth compressing.
ALTER TABLE handed ALTER COLUMN job SET STORAGE EXTERNAL, ALTER COLUMN notification SET STORAGE EXTERNAL,
    ALTER COLUMN route SET STORAGE EXTERNAL, ALTER COLUMN first_user SET STORAGE EXTERNAL,
    ALTER COLUMN last_user SET STORAGE EXTERNAL, ALTER COLUMN target_count SET STORAGE EXTERNAL,
    ALTER COLUMN targets SET STORAGE EXTERNAL;
ALTER TABLE handed SET (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0, vacuum_truncate = false);

-- Whether a replica knows of them. They are written only where all that live do.
ALTER TABLE replica ADD COLUMN rowless SMALLINT NOT NULL DEFAULT 0;

-- Those of them that are open: their notification is there (a key that was taken meanwhile left none), and no block tells of them.
-- A job of a group is the only one of its notification for its route. A block may be two days (in an id's milliseconds) older by its id
-- than its notification. OFFSET 0: nothing but the indexes by id and by notification can be used.
CREATE VIEW handed_job AS
    SELECT h.job AS id, n.app, h.notification AS notification_id, h.route, n.lane, h.format, n.accepted_at AS ready_at,
        n.accepted_at AS due_at, h.owner, 1::BIGINT AS fence, 0 AS attempt, 1 AS claims, NULL::BIGINT AS first_attempt_at,
        h.first_user, h.last_user, h.target_count, h.targets, NULL::BYTEA AS progress, h.handed
    FROM (SELECT id AS handed, owner, format, unnest(job) AS job, unnest(notification) AS notification, unnest(route) AS route,
            unnest(first_user) AS first_user, unnest(last_user) AS last_user, unnest(target_count) AS target_count,
            unnest(targets) AS targets
        FROM handed) AS h
    CROSS JOIN LATERAL (SELECT app, lane, accepted_at FROM notification WHERE id = h.notification OFFSET 0) AS n
    WHERE NOT EXISTS (SELECT 1 FROM outcome_block b WHERE b.notification_id = h.notification AND b.route = h.route
        AND b.id >= h.notification - 724775731200000 OFFSET 0);

-- All open jobs.
CREATE VIEW open_job AS
    SELECT id, app, notification_id, route, lane, format, ready_at, due_at, owner, fence, attempt, claims, first_attempt_at,
        first_user, last_user, target_count, targets, progress
    FROM job
    UNION ALL
    SELECT id, app, notification_id, route, lane, format, ready_at, due_at, owner, fence, attempt, claims, first_attempt_at,
        first_user, last_user, target_count, targets, progress
    FROM handed_job;
