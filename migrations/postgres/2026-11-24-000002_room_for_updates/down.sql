ALTER TABLE device RESET (fillfactor);
ALTER TABLE app_user RESET (fillfactor);
