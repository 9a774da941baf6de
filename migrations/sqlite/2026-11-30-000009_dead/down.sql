UPDATE device SET state = 2,
    retired_reason = (SELECT json_extract(u.dead, '$."' || device.id || '"[0]') FROM app_user u WHERE u.id = device.user_key),
    retired_at = (SELECT json_extract(u.dead, '$."' || device.id || '"[1]') FROM app_user u WHERE u.id = device.user_key)
    WHERE id IN (SELECT CAST(e.key AS INTEGER) FROM app_user u, json_each(u.dead) e) AND state = 1;
ALTER TABLE app_user DROP COLUMN dead;
