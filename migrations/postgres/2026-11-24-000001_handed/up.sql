-- SQLite's alone: jobs that were handed over as their event was accepted. What is moved here with it has ended.
ALTER TABLE notification ADD COLUMN handed BYTEA;
