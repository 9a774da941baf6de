-- SQLite's only: here a table has no order of its own, and keys are found by when they expire.
SELECT 1;
