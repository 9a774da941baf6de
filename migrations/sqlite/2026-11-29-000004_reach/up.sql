-- How a person can be reached and what they chose, packed into their own row (see storage/reach.rs): one way down one tree
-- instead of three. Null while nobody has packed it (a start does), or when it is too large. The index of a person's devices need
-- not hold what sending needs any more, and so a device that is retired does not change it.
ALTER TABLE app_user ADD COLUMN reach BLOB;
DROP INDEX device_by_user;
CREATE INDEX device_by_user ON device (user_key, id);
