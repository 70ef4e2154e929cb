-- The consumer's role and all that it needs: to log in, to replicate, and to read what it copies.
-- The password is for a server that nobody else can reach; elsewhere choose another one (\password cdc).

CREATE ROLE cdc LOGIN REPLICATION PASSWORD 'cdc';

-- Everybody may connect and make temporary tables, unless told otherwise.
REVOKE ALL ON DATABASE :"DBNAME" FROM PUBLIC;
GRANT CONNECT ON DATABASE :"DBNAME" TO cdc;
GRANT USAGE ON SCHEMA public TO cdc;
GRANT SELECT ON public.subscriptions TO cdc;
