-- Nobody keeps it true any more.
DROP TRIGGER opt_in_forgets_reach ON opt_in;
DROP TRIGGER device_forgets_reach ON device;
DROP FUNCTION forget_reach();
UPDATE app_user SET reach = NULL WHERE reach IS NOT NULL;
