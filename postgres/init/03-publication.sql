-- What the consumer subscribes to. The tables' owner makes it, so that the consumer needs no right to do so; it uses a
-- publication that it did not make as it is. A further table, with a primary key, as the owner:
--
--     ALTER PUBLICATION cdc ADD TABLE public.invoices;
--     GRANT SELECT ON public.invoices TO cdc;

CREATE PUBLICATION cdc FOR TABLE public.subscriptions WITH (publish_via_partition_root = true);
