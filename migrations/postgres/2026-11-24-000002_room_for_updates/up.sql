-- A registration that repeats, once a day from most phones, changes no indexed column of a device and of its person. With
-- room on their pages the new version of such a row stays there and no index is written; on full ones each such change
-- writes to every index of the table, at random places. Only pages filled from now on are left room; nothing is rewritten.
ALTER TABLE device SET (fillfactor = 90);
ALTER TABLE app_user SET (fillfactor = 90);
