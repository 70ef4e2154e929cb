-- 5,000 rows that are the same wherever and whenever they are made: arithmetic with primes in place of random().
-- Three in five are on the free plan, every eleventh or so has left; their last changes lie in 2024 and 2025.

INSERT INTO public.subscriptions (email, plan, lifetime_value, deleted_at, updated_at)
SELECT email,
       plan,
       -- the months paid for, and what was billed besides
       CASE plan WHEN 'free' THEN 0 ELSE price * months + (i * 37 % 10000) / 100.0 END,
       CASE WHEN i * 5683 % 1000 < 90 THEN changed_at END,
       changed_at
FROM (
    SELECT i,
           lower(first_names[1 + i % 20] || '.' || last_names[1 + i / 20 % 25])
               || coalesce(nullif(i / 500 + 1, 1)::text, '')
               || '@' || domains[1 + i * 11 % 3] AS email,
           CASE
               WHEN i * 7919 % 100 < 60 THEN 'free'
               WHEN i * 7919 % 100 < 85 THEN 'starter'
               WHEN i * 7919 % 100 < 97 THEN 'pro'
               ELSE 'enterprise'
           END AS plan,
           1 + i * 104729 % 36 AS months,
           -- two years have 731 days, one of them being 2024
           timestamptz '2024-01-01 00:00:00+00' + (i::bigint * 15485863 % (731 * 86400)) * interval '1 second'
               AS changed_at
    FROM generate_series(0, 4999) AS i,
         (SELECT string_to_array('Ada Alan Barbara Carla Chen Dana Edsger Emeka Fatima Grace '
                     'Hugo Ines Jonas Kofi Leila Mateo Nadia Olga Priya Sven', ' '),
                 string_to_array('Adams Becker Castro Diallo Eriksen Fischer Garcia Hansen Ivanova Jansen '
                     'Kowalski Larsen Meyer Novak Okafor Patel Quinn Rossi Silva Tanaka '
                     'Ueda Vargas Weber Xu Yilmaz', ' '),
                 ARRAY['example.com', 'example.net', 'example.org']
         ) AS words (first_names, last_names, domains)
) AS people
JOIN (VALUES ('free', 0.00), ('starter', 19.00), ('pro', 79.00), ('enterprise', 1900.00)) AS prices (name, price)
    ON name = plan
ORDER BY i;

ANALYZE public.subscriptions;
