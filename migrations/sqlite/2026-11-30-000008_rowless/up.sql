-- Postgres': here they are a column of their notification.
SELECT 1;
