-- Devices whose tokens a platform called dead, named in their person's row (see storage/sqlite/dead.rs): a dead token takes its
-- device out of the person's reach and so writes that row anyway; the device's own, at a random place, is left alone. Null for none.
ALTER TABLE app_user ADD COLUMN dead TEXT;
