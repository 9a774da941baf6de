-- One index of tokens, whatever the state of their devices, and one of installations. A token that a platform calls dead
-- changed four pages at random places; without a state in these indexes it changes its row and device_by_user. That an
-- active token has one row is seen to by the one writer, which looks before it writes.
DROP INDEX device_by_old_token;
DROP INDEX device_by_token;
CREATE INDEX device_by_token ON device (app, platform, plugin, token_hash, id);
DROP INDEX device_by_installation;
CREATE INDEX device_by_installation ON device (app, installation_id, id) WHERE installation_id IS NOT NULL;
