-- SQLite's: an index leads to a row here, not to another tree.
SELECT 1;
