"""The endpoints that the relays deliver to, and who of them does.

Whoever changes them locks the rows of all relays, each of which locks its own for every transaction: so when
a change is committed, whatever goes on without it is over, and whatever comes after knows of it by the
revision.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from asyncpg import Connection

from relay.outbox import KeptEndpoint
from relay.outbox.postgres.links import transaction
from relay.outbox.postgres.statements import REVISION
from relay.outbox.statements import read_health

EVERYBODY = "SELECT id FROM relay.relays ORDER BY id FOR NO KEY UPDATE"
REVISED = "UPDATE relay.relays SET revision = revision + 1"
HELD_BY_OTHERS = (
    "SELECT 1 FROM relay.holders h JOIN relay.relays r ON r.id = h.relay"
    " WHERE h.endpoint = e.number AND h.relay <> $1"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """Endpoints that a relay delivers to."""

    numbers: dict[str, int]
    healths: dict[int, str | None]
    revision: int | None  # that this made; None: nothing was changed
    absent: dict[str, int] = field(default_factory=dict)  # those that no relay delivers to


async def register(link: Connection, *, ids: Sequence[str], relay: int) -> Taken:
    """Make these the endpoints that a relay delivers to."""
    async with transaction(link):
        await link.execute(EVERYBODY)
        rows = await link.fetch(
            "INSERT INTO relay.endpoints (id, live) SELECT t.id, true FROM unnest($1::text[])"
            " WITH ORDINALITY AS t (id, place) ORDER BY t.place"
            " ON CONFLICT (id) DO UPDATE SET live = true RETURNING id, number, health",
            list(ids),
        )
        await _hold(link, relay, [row["number"] for row in rows])
        absent = await link.fetch(
            "UPDATE relay.endpoints e SET live = false, health = NULL"  # noqa: S608 - our own words
            f" WHERE e.id <> ALL ($2::text[]) AND NOT EXISTS ({HELD_BY_OTHERS}) RETURNING e.id, e.number",
            relay,
            list(ids),
        )
        await link.execute(REVISED)
        return await _taken(link, rows, relay, dict(absent))


async def _hold(link: Connection, relay: int, numbers: Sequence[int]) -> None:
    await link.execute("DELETE FROM relay.holders WHERE relay = $1", relay)
    await link.execute(
        "INSERT INTO relay.holders (relay, endpoint) SELECT r.id, unnest($2::int[]) FROM relay.relays r"
        " WHERE r.id = $1",
        relay,
        numbers,
    )


async def _taken(link: Connection, rows: Sequence[Any], relay: int, absent: dict[str, int]) -> Taken:
    revision = await link.fetchval(REVISION, relay)
    return Taken(
        numbers={row["id"]: row["number"] for row in rows},
        healths={row["number"]: row["health"] for row in rows},
        revision=revision,
        absent=absent,
    )


async def keep(link: Connection, *, endpoint: KeptEndpoint, relay: int) -> Taken:
    """Keep an endpoint's settings, and that a relay delivers to it."""
    async with transaction(link):
        await link.execute(EVERYBODY)
        rows = await link.fetch(
            "INSERT INTO relay.endpoints (id, settings, paused, live) VALUES ($1, $2, $3, true)"
            " ON CONFLICT (id) DO UPDATE SET settings = excluded.settings, paused = excluded.paused,"
            " live = true RETURNING id, number, health",
            endpoint.id,
            endpoint.settings,
            endpoint.paused,
        )
        await link.execute(
            "INSERT INTO relay.holders (relay, endpoint) SELECT id, $2 FROM relay.relays WHERE id = $1"
            " ON CONFLICT DO NOTHING",
            relay,
            rows[0]["number"],
        )
        await link.execute(REVISED)
        return await _taken(link, rows, relay, {})


async def drop(
    link: Connection, *, id_: str, aside: KeptEndpoint | None, relay: int
) -> tuple[bool, int | None]:
    """Let an endpoint be no more, or, what is put aside, no more of ours.

    Returns whether nobody has it then, and the revision that makes.
    """
    async with transaction(link):
        await link.execute(EVERYBODY)
        ours = "" if aside is None else " AND h.relay = $2"
        await link.execute(
            "DELETE FROM relay.holders h USING relay.endpoints e"  # noqa: S608 - our own words
            f" WHERE h.endpoint = e.number AND e.id = $1{ours}",
            id_,
            *([relay] if aside is not None else []),
        )
        dropped = await link.fetchval(
            "UPDATE relay.endpoints e SET live = false, settings = $3, paused = $4"  # noqa: S608 - our own words
            f" WHERE e.id = $2 AND NOT EXISTS ({HELD_BY_OTHERS}) RETURNING e.number",
            relay,
            id_,
            aside.settings if aside is not None else None,
            aside.paused if aside is not None else False,
        )
        await link.execute(REVISED)
        return dropped is not None, await link.fetchval(REVISION, relay)


async def follow(link: Connection, *, ids: Sequence[str], relay: int) -> Taken:
    """Let a relay deliver to these, as they are kept."""
    async with transaction(link):
        await link.execute("SELECT revision FROM relay.relays WHERE id = $1 FOR NO KEY UPDATE", relay)
        rows = await link.fetch(
            "SELECT id, number, health FROM relay.endpoints WHERE live AND id = ANY ($1::text[])", list(ids)
        )
        await _hold(link, relay, [row["number"] for row in rows])
        # Of what others have changed since we read the endpoints we know nothing by this.
        return replace(await _taken(link, rows, relay, {}), revision=None)


async def keep_health(link: Connection, *, number: int, health: str) -> None:
    """Keep how an endpoint stands, whatever others think."""
    await link.execute("UPDATE relay.endpoints SET health = $2 WHERE number = $1", number, health)


async def kept(link: Connection, *, relay: int) -> tuple[list[KeptEndpoint], int | None]:
    """Return every endpoint there ever was, and the revision that this is of, or a later one."""
    revision = await link.fetchval(REVISION, relay)
    rows = await link.fetch("SELECT id, settings, paused, health FROM relay.endpoints ORDER BY number")
    return [
        KeptEndpoint(id=id_, settings=settings, paused=paused, health=read_health(health))
        for id_, settings, paused, health in rows
    ], revision
