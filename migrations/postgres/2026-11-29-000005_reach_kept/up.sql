-- Who changes a device or a choice packs its person anew in the same transaction (see storage/reach.rs), and says so by this
-- setting of their session. Whoever does not, be it a replica of an earlier version or a person at psql, only makes that what
-- is packed is forgotten: the rows are read then until somebody packs the person again. Written also where nothing is packed:
-- who packs at this moment waits for the person's row, and then sees what was changed.
CREATE FUNCTION forget_reach() RETURNS TRIGGER LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    IF TG_OP = 'DELETE' THEN
        UPDATE app_user SET reach = NULL WHERE id = OLD.user_key;
    ELSIF TG_OP = 'INSERT' THEN
        UPDATE app_user SET reach = NULL WHERE id = NEW.user_key;
    ELSE
        UPDATE app_user SET reach = NULL WHERE id IN (OLD.user_key, NEW.user_key);
    END IF;
    RETURN NULL;
END
$$;
CREATE TRIGGER device_forgets_reach AFTER INSERT OR DELETE
    OR UPDATE OF id, user_key, state, route, token_sealed, seal_key, locale ON device
    FOR EACH ROW WHEN (current_setting('nudged.packs', TRUE) IS DISTINCT FROM 'on') EXECUTE FUNCTION forget_reach();
CREATE TRIGGER opt_in_forgets_reach AFTER INSERT OR DELETE OR UPDATE OF user_key, device, event_type, opted_in ON opt_in
    FOR EACH ROW WHEN (current_setting('nudged.packs', TRUE) IS DISTINCT FROM 'on') EXECUTE FUNCTION forget_reach();
