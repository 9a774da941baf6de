-- SQLite's only: many writers need the index that keeps an active token to one row.
SELECT 1;
