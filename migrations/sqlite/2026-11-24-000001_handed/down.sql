ALTER TABLE notification DROP COLUMN handed;
