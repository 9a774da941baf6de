-- Texts that indexes hold are compared byte by byte, as on SQLite, and not by the database's own collation: that asks the
-- rules of a language some twenty times for each look-up, and an upgrade of the system's library may change its order
-- beneath an index, which then misses rows and takes others twice. Only indexes are built anew, no table is.
DROP TRIGGER opt_in_forgets_reach ON opt_in;
ALTER TABLE app ALTER COLUMN name TYPE TEXT COLLATE "C";
ALTER TABLE app_user ALTER COLUMN external_id TYPE TEXT COLLATE "C";
ALTER TABLE device ALTER COLUMN plugin TYPE TEXT COLLATE "C", ALTER COLUMN installation_id TYPE TEXT COLLATE "C";
ALTER TABLE event_type_version ALTER COLUMN name TYPE TEXT COLLATE "C";
ALTER TABLE idempotency ALTER COLUMN key TYPE TEXT COLLATE "C";
ALTER TABLE import_progress ALTER COLUMN name TYPE TEXT COLLATE "C";
ALTER TABLE mute ALTER COLUMN name TYPE TEXT COLLATE "C";
ALTER TABLE opt_in ALTER COLUMN event_type TYPE TEXT COLLATE "C";
ALTER TABLE pace ALTER COLUMN name TYPE TEXT COLLATE "C";
ALTER TABLE pause ALTER COLUMN name TYPE TEXT COLLATE "C";
ALTER TABLE provider_trouble ALTER COLUMN name TYPE TEXT COLLATE "C";
ALTER TABLE restoration ALTER COLUMN name TYPE TEXT COLLATE "C";
ALTER TABLE route ALTER COLUMN plugin TYPE TEXT COLLATE "C", ALTER COLUMN credential TYPE TEXT COLLATE "C", ALTER COLUMN bundle TYPE TEXT COLLATE "C";
ALTER TABLE secret ALTER COLUMN name TYPE TEXT COLLATE "C";
ALTER TABLE topic ALTER COLUMN name TYPE TEXT COLLATE "C";
ALTER TABLE user_counter ALTER COLUMN name TYPE TEXT COLLATE "C";
ALTER TABLE watermark ALTER COLUMN name TYPE TEXT COLLATE "C";
-- The statistics of these columns went with their types; of what is known to be empty the server would plan as if it stayed so.
DO $$ DECLARE t REGCLASS; filled BOOLEAN; BEGIN
    FOREACH t IN ARRAY ARRAY['app_user', 'device', 'idempotency', 'opt_in', 'topic']::REGCLASS[] LOOP
        EXECUTE format('SELECT EXISTS (SELECT FROM %s)', t) INTO filled;
        IF filled THEN EXECUTE format('ANALYZE %s', t); END IF;
    END LOOP;
END $$;
CREATE TRIGGER opt_in_forgets_reach AFTER INSERT OR DELETE OR UPDATE OF user_key, device, event_type, opted_in ON opt_in
    FOR EACH ROW WHEN (current_setting('nudged.packs', TRUE) IS DISTINCT FROM 'on') EXECUTE FUNCTION forget_reach();
