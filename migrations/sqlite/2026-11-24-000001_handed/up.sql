-- Jobs that were handed over as their event was accepted, packed (see storage/sqlite/handed.rs). Such a job is in no other
-- table: it has ended when outcome blocks name its targets. Null when there are none, or when they got rows in `job`.
ALTER TABLE notification ADD COLUMN handed BLOB;
