DROP INDEX device_by_user;
CREATE INDEX device_by_user ON device (user_key, id, state, route, has_choice, seal_key, locale, token_sealed);
ALTER TABLE app_user DROP COLUMN reach;
DELETE FROM watermark WHERE name = 'reach';
