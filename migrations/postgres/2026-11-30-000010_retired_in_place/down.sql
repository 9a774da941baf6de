UPDATE device SET state = 2 WHERE state = 1 AND retired_at IS NOT NULL;
DROP TRIGGER device_in_place_forgets_reach ON device;
ALTER TABLE replica DROP COLUMN dead_in_place;
