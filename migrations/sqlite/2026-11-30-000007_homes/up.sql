-- A person's row is where their name says (see storage/sqlite/homes.rs); the indexes hold only those who are not at home, which
-- here is everybody who has a row already. The second half of the condition is for rows whose ids a clock before 2024 made.
DROP INDEX app_user_by_name;
CREATE UNIQUE INDEX app_user_by_name ON app_user (app, external_id)
    WHERE (id >= 281474976710656 OR created_at < 1704153600000);
DROP INDEX app_user_by_app;
CREATE INDEX app_user_by_app ON app_user (app, id)
    WHERE (id >= 281474976710656 OR created_at < 1704153600000);
