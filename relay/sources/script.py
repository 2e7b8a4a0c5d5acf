"""The SQL that an application's database needs before it can submit: a schema's name in, the text out."""

import re
from importlib import resources

VERSION = 1  # of what submit.sql makes; a newer one is for a newer relay
CHANNEL = "relay_submit"

# NOTIFY takes a lock of the whole server until its transaction has committed: commits queue up, and with 16
# clients there were 38 % fewer. One that goes without a hint while another's is under way costs nothing.
HINT = f"""\
    IF pg_try_advisory_xact_lock(1919249529, 1) THEN
        PERFORM pg_notify('{CHANNEL}', '');
    END IF;"""
# The table is nearly always empty, and as many rows are deleted as are inserted.
TUNING = """\
ALTER TABLE {schema}.relay_submissions
    SET (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);"""
_COMMENT = re.compile(r"^--\{(\w+)\}$", re.MULTILINE)


def script(schema: str, *, portable: bool = False) -> str:
    """Return the SQL; `portable` leaves out what engines that are like PostgreSQL may not have."""
    text = resources.files("relay.sources").joinpath("submit.sql").read_text(encoding="utf-8")
    parts = {"tuning": "" if portable else TUNING, "hint": "" if portable else HINT}
    text = _COMMENT.sub(lambda found: parts[found[1]], text)
    return text.replace("{schema}", quoted(schema)).replace("{version}", str(VERSION))


def quoted(name: str) -> str:
    """Write a name as an SQL identifier, in quotes where it needs them."""
    if re.fullmatch(r"[a-z_][a-z0-9_]*", name):
        return name
    return '"' + name.replace('"', '""') + '"'
