-- relay_submit: events submitted inside the application's own transaction. Version {version}.
--
-- Put this among the application's migrations; run again it changes nothing. The relay reads what was committed
-- and deletes what it has accepted. What it cannot accept stays here, its reason in the column refusal.

CREATE TABLE IF NOT EXISTS {schema}.relay_submissions (
    seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    id text NOT NULL,                  -- of the event to be
    event text NOT NULL,
    data json NOT NULL,
    "timestamp" timestamptz,
    key text,
    idempotency_key text,
    "to" text[],
    traceparent text,
    tracestate text,
    submitted_at timestamptz NOT NULL,
    refusal text,                      -- why it was not accepted; NULL: it waits
    refused_at timestamptz
);
CREATE INDEX IF NOT EXISTS relay_submissions_waiting
    ON {schema}.relay_submissions (seq) WHERE refusal IS NULL;
CREATE INDEX IF NOT EXISTS relay_submissions_key
    ON {schema}.relay_submissions (key, seq) WHERE refusal IS NULL AND key IS NOT NULL;
CREATE INDEX IF NOT EXISTS relay_submissions_refused
    ON {schema}.relay_submissions (refused_at) WHERE refusal IS NOT NULL;
--{tuning}

CREATE OR REPLACE FUNCTION {schema}.relay_submit(
    event text,
    data json,
    "timestamp" timestamptz DEFAULT NULL,
    key text DEFAULT NULL,
    idempotency_key text DEFAULT NULL,
    "to" text[] DEFAULT NULL,
    traceparent text DEFAULT NULL,
    tracestate text DEFAULT NULL
) RETURNS text
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $relay$
DECLARE
    -- A UUIDv7, whose first 48 bits are milliseconds since 1970.
    made text := 'evt_'
        || lpad(to_hex(floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint), 12, '0')
        || '7' || substr(replace(gen_random_uuid()::text, '-', ''), 14);
BEGIN
    INSERT INTO {schema}.relay_submissions
        (id, event, data, "timestamp", key, idempotency_key, "to", traceparent, tracestate, submitted_at)
    VALUES
        (made, event, data, "timestamp", key, idempotency_key, "to", traceparent, tracestate, clock_timestamp());
--{hint}
    RETURN made;
END
$relay$;

CREATE OR REPLACE FUNCTION {schema}.relay_submit_version() RETURNS integer
LANGUAGE sql IMMUTABLE AS $relay$ SELECT {version} $relay$;

-- Who may submit needs no more than this:
--   GRANT EXECUTE ON FUNCTION {schema}.relay_submit TO app;
-- Who reads for the relay, where that is not the owner:
--   GRANT SELECT, UPDATE, DELETE ON {schema}.relay_submissions TO relay;
REVOKE ALL ON FUNCTION {schema}.relay_submit(
    text, json, timestamptz, text, text, text[], text, text
) FROM PUBLIC;
