DROP VIEW open_job;
-- By an older version nobody would take them up.
INSERT INTO job (id, app, notification_id, route, lane, format, ready_at, due_at, owner, fence, attempt, claims, first_user, last_user,
    target_count, targets)
    SELECT id, app, notification_id, route, lane, format, ready_at, due_at, 0, 2, attempt, claims, first_user, last_user,
        target_count, targets
    FROM handed_job ON CONFLICT (id) DO NOTHING;
DROP VIEW handed_job;
ALTER TABLE replica DROP COLUMN rowless;
DROP TABLE handed;
