-- Three rows of the demonstration's table: insert one, update one, soft-delete one. Each time three others.
-- Run by `cdc demo --changes`, or by hand:
--
--     psql -f postgres/changes.sql postgresql://analyst:analyst@localhost:5437/analytics

-- A new customer.
WITH next (id) AS (SELECT nextval(pg_get_serial_sequence('public.subscriptions', 'id')))
INSERT INTO public.subscriptions (id, email, plan, lifetime_value)
SELECT id, format('newcomer%s@example.com', id), 'starter', 19.00 FROM next;

-- Whoever nothing has happened to for longest goes up to enterprise.
UPDATE public.subscriptions SET plan = 'enterprise', lifetime_value = lifetime_value + 1900.00
WHERE id = (SELECT id FROM public.subscriptions WHERE deleted_at IS NULL ORDER BY updated_at, id LIMIT 1);

-- The next one leaves. A trigger keeps the row and sets its deleted_at, so the server reports DELETE 0.
DELETE FROM public.subscriptions
WHERE id = (SELECT id FROM public.subscriptions WHERE deleted_at IS NULL ORDER BY updated_at, id LIMIT 1);
