-- SQLite's: how a person can be reached, packed (see storage/reach.rs). Here nothing writes it yet.
ALTER TABLE app_user ADD COLUMN reach BYTEA;
