DROP INDEX device_by_installation;
CREATE INDEX device_by_installation ON device (app, installation_id) WHERE state = 1 AND installation_id IS NOT NULL;
DROP INDEX device_by_token;
CREATE UNIQUE INDEX device_by_token ON device (app, platform, plugin, token_hash) WHERE state = 1;
CREATE INDEX device_by_old_token ON device (app, platform, plugin, token_hash, id) WHERE state <> 1;
