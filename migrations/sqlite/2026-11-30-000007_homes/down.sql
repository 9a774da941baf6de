DROP INDEX app_user_by_app;
CREATE INDEX app_user_by_app ON app_user (app, id);
DROP INDEX app_user_by_name;
CREATE UNIQUE INDEX app_user_by_name ON app_user (app, external_id);
