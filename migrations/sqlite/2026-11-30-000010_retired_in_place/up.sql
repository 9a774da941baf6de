-- Postgres' only: here a dead token leaves its device's row alone.
SELECT 1;
