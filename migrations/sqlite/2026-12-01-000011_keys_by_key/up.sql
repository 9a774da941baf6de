-- Expired keys are found by going through all of them in their own order, a range at a time: an index of when they expire was a
-- third of their bytes, an entry to write for each event, and led to a page at a random place for each key it deleted.
DROP INDEX idempotency_by_expiry;
