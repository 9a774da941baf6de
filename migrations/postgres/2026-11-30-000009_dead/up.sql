-- SQLite's only: here a dead token changes its device's row. The column is there so that both have the same, and null.
ALTER TABLE app_user ADD COLUMN dead TEXT;
