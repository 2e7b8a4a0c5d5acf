"""Opening the PostgreSQL outbox: its address in, the verbs out, for as long as we are one of its relays."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from relay.model import Secret
from relay.outbox import AwayError, Bounds, Committed
from relay.outbox.postgres import schema
from relay.outbox.postgres.links import Links
from relay.outbox.postgres.store import PostgresOutbox
from relay.outbox.sharing import Sharing

log = logging.getLogger("relay.outbox")

READERS = 4  # connections for claims and for looking, besides the one that writes
MIGRATION_SECONDS = 300.0


@asynccontextmanager
async def open_postgres(
    url: Secret, *, bounds: Bounds, sharing: Sharing, committed: Committed
) -> AsyncIterator[PostgresOutbox]:
    """Join the relays on the database; left again, with all that waits written, on the way out."""
    readers, writer = Links(url, READERS), Links(url, 1)
    listening: Links | None = None
    if sharing.listen_url is not None or not readers.pooled:  # a pooler keeps nobody's connection
        listening = Links(sharing.listen_url or url, 1)
    try:
        async with writer.link(MIGRATION_SECONDS) as link:
            await schema.refuse_part(link, writer.name)
            await schema.prepare(link, writer.name)
        async with asyncio.TaskGroup() as tasks:
            outbox = PostgresOutbox(
                readers,
                writer,
                listening,
                tasks,
                bounds=bounds,
                sharing=sharing,
                committed=committed,
            )
            await outbox.start()
            chore = tasks.create_task(outbox.keep_house())
            tasks.create_task(outbox.commit_batches())
            try:
                yield outbox
            finally:
                chore.cancel()
                outbox.close()
        try:
            await outbox.stop()
        except AwayError as error:  # what we claimed is free when our heartbeat lapses
            log.warning("outbox_away", extra={"error": str(error)})
    finally:
        readers.close()
        writer.close()
