-- A device whose token a platform called dead may keep its state 1, and with it its place in every index, and be retired by
-- its retired_at alone (see storage/postgres/dead.rs). Whether a replica knows of that; it is done only where all that live do.
ALTER TABLE replica ADD COLUMN dead_in_place SMALLINT NOT NULL DEFAULT 0;
-- So that time counts for what is packed of a person. Beside the trigger that there is, which to replace would stop all readers.
CREATE TRIGGER device_in_place_forgets_reach AFTER UPDATE OF retired_at ON device
    FOR EACH ROW WHEN (current_setting('nudged.packs', TRUE) IS DISTINCT FROM 'on') EXECUTE FUNCTION forget_reach();
