-- Postgres': SQLite compares texts byte by byte anyway.
SELECT 1;
