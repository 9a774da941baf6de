-- Postgres' only: whoever changes an SQLite file is its one server, which packs people itself.
SELECT 1;
