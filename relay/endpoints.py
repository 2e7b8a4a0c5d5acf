"""The endpoints there are: those of the config, which stay as they are, and those of the API.

Changes come in as plain settings (contract section 4), are read by the rules of the config, kept in the
outbox, and only then take effect: for what is accepted from now on, and for every attempt from the next.
One change at a time; what it would break is said before anything is written. A new config is one change too.
"""

import asyncio
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import orjson

from relay import egress
from relay.alike import compared
from relay.clock import Clock
from relay.config import DeliverySettings, SettingsError, read_api_endpoint
from relay.health import set_right, was_at_rest
from relay.model import Endpoint, Health
from relay.outbox import KeptEndpoint, Outbox, UnavailableError
from relay.registered import Changes, Registered, Settings, kept_of, refuse_internal, same, unless_same
from relay.signing import PRIVATE_KEY, SHARED_KEY, secret_of
from relay.subscription import Subscriptions

SECRET_BYTES = 32
DEFAULT_OVERLAP_SECONDS = 24 * 3600.0
MOST_SECRETS = 5  # live at once
FULL_RETRY_MS = 10_000
AWAY_RETRY_MS = 1_000

UNKNOWN = Health()  # so is an endpoint that nothing was sent to yet


class ConflictError(Exception):
    """A change that does not fit what is there; the text says why and what to do."""


class UnknownEndpointError(Exception):
    """There is no endpoint of this id."""


class Lanes(Protocol):
    """Who brings deliveries to the endpoints."""

    async def keep(self, endpoint: Endpoint, *, paused: bool, health: Health = UNKNOWN) -> None: ...

    async def resume(self, endpoint: str) -> None: ...

    async def drop(self, endpoint: str) -> Health: ...


class Endpoints:
    """The register; `change` is told the new subscriptions whenever they are others."""

    def __init__(
        self,
        *,
        configured: Sequence[Endpoint],
        defaults: DeliverySettings,
        policy: egress.Policy,
        outbox: Outbox,
        lanes: Lanes,
        clock: Clock,
        change: Callable[[Subscriptions], None],
    ) -> None:
        self._registered: dict[str, Registered] = {}
        self._configured = configured
        self._defaults = defaults
        self._policy = policy
        self._outbox = outbox
        self._lanes = lanes
        self._clock = clock
        self._change = change
        self._aside: dict[str, bytes] = {}
        self._one_at_a_time = asyncio.Lock()
        self._changed = asyncio.Event()
        self._elsewhere = asyncio.Event()

    async def open(self) -> tuple[dict[str, int], list[str]]:
        """Take up what the outbox keeps, and start delivering.

        Returns how many deliveries were cancelled of endpoints that are no longer there, and the ids of
        endpoints of the API that are set aside because the config has their id or URL or can no longer allow
        them.
        """
        now_ms = self._clock.now_ms()
        at_rest = was_at_rest(await self._outbox.last_seen(), now_ms)
        kept = await self._outbox.endpoints()
        healths = {each.id: each.health for each in kept}
        self._registered, self._aside = self._joined(kept)
        cancelled = await self._outbox.register(list(self._registered))
        for each in self._registered.values():
            health = healths.get(each.endpoint.id, UNKNOWN) if each.endpoint.id not in cancelled else UNKNOWN
            if at_rest:
                health = set_right(health, each.endpoint, now_ms)
                await self._outbox.keep_health(each.endpoint.id, health)
            await self._lanes.keep(each.endpoint, paused=each.paused, health=health)
        self._change(self._subscriptions())
        return cancelled, list(self._aside)

    async def reload(
        self, *, configured: Sequence[Endpoint], defaults: DeliverySettings, policy: egress.Policy
    ) -> Changes:
        """Go on with another config; endpoints that are the same in it notice nothing.

        Raises UnavailableError, and then nothing has changed.
        """
        async with self._one_at_a_time:
            before, aside_before = self._registered, self._aside
            rules = self._configured, self._defaults, self._policy
            self._configured, self._defaults, self._policy = configured, defaults, policy
            kept = await self._outbox.endpoints()
            registered, aside = self._joined(kept)
            if policy == rules[2]:  # else every endpoint is to be judged anew
                registered = {id_: unless_same(each, before.get(id_)) for id_, each in registered.items()}
            added = [each for id_, each in registered.items() if id_ not in before]
            try:
                for each in added:
                    await self._outbox.keep_endpoint(kept_of(each, aside))
            except UnavailableError:
                self._configured, self._defaults, self._policy = rules
                raise
            self._registered, self._aside = registered, aside
            healths = {each.id: each.health for each in kept}
            for id_, each in registered.items():
                if each is not before.get(id_):
                    await self._lanes.keep(
                        each.endpoint, paused=each.paused, health=healths.get(id_, UNKNOWN)
                    )
            self._change(self._subscriptions())
            self._changed.set()
            removed = [id_ for id_ in before if id_ not in registered]
            cancelled = {id_: await self._let_go(id_, before[id_].paused) for id_ in removed}
            return Changes(
                added=tuple(each.endpoint.id for each in added),
                changed=tuple(
                    id_ for id_, each in registered.items() if id_ in before and not same(each, before[id_])
                ),
                removed=tuple(removed),
                cancelled={id_: count for id_, count in cancelled.items() if count},
                aside=tuple(id_ for id_ in aside if id_ not in aside_before),
            )

    def changed_elsewhere(self) -> None:
        """Take note that another relay on the same outbox has changed endpoints."""
        self._elsewhere.set()

    async def follow(self) -> None:
        """Do as other relays do with endpoints; until cancelled."""
        while True:
            await self._elsewhere.wait()
            self._elsewhere.clear()
            try:
                async with self._one_at_a_time:
                    await self._catch_up()
            except UnavailableError:
                await self._clock.wait(asyncio.Event(), self._clock.now_ms() + AWAY_RETRY_MS)
                self._elsewhere.set()

    async def _catch_up(self) -> None:
        """Take over what another relay has kept, changed or dropped, before something is done here."""
        if await self._outbox.is_current():
            return
        kept = await self._outbox.endpoints()
        healths = {each.id: each.health for each in kept}
        before = self._registered
        registered, self._aside = self._joined(kept)
        self._registered = {id_: unless_same(each, before.get(id_)) for id_, each in registered.items()}
        for id_ in before.keys() - registered.keys():
            await self._lanes.drop(id_)
        await self._outbox.follow(list(self._registered))
        for id_, each in self._registered.items():
            if each is not before.get(id_):
                health = healths.get(id_, UNKNOWN)
                await self._lanes.keep(each.endpoint, paused=each.paused, health=health)
        self._change(self._subscriptions())
        self._changed.set()

    async def _let_go(self, id_: str, paused: bool) -> int:  # noqa: FBT001
        """Bring no more to an endpoint that the config has no more, or that is set aside."""
        await self._lanes.drop(id_)
        try:
            return await self._outbox.drop_endpoint(
                id_, KeptEndpoint(id=id_, settings=self._aside.get(id_), paused=paused)
            )
        except UnavailableError:  # what waits for it stays until the next start cancels it
            return 0

    def _joined(self, kept: Sequence[KeptEndpoint]) -> tuple[dict[str, Registered], dict[str, bytes]]:
        """Join the config's endpoints with those the outbox keeps; the settings of those it sets aside."""
        registered = {each.id: Registered(endpoint=each) for each in self._configured}
        urls = {compared(each.url) for each in self._configured}
        aside: dict[str, bytes] = {}
        for each in kept:
            configured = registered.get(each.id)
            if configured is not None:
                registered[each.id] = replace(configured, paused=each.paused)
            if each.settings is None:
                continue
            own = None if configured is not None else self._readable(each)
            if own is None or compared(own.endpoint.url) in urls:
                aside[each.id] = each.settings
            else:
                registered[each.id] = own
        return registered, aside

    def _readable(self, kept: KeptEndpoint) -> Registered | None:
        """Read an endpoint of the API; None when the config can no longer allow it."""
        try:
            return self._read(orjson.loads(kept.settings or b""), paused=kept.paused)
        except SettingsError:
            return None

    def all(self) -> list[Registered]:
        """Return every endpoint, those of the config first."""
        return sorted(
            self._registered.values(), key=lambda each: (each.settings is not None, each.endpoint.id)
        )

    def get(self, id_: str) -> Registered:
        """Return one endpoint. Raises UnknownEndpointError."""
        try:
            return self._registered[id_]
        except KeyError:
            raise UnknownEndpointError(id_) from None

    async def put(self, values: Settings) -> tuple[Registered, str | None]:
        """Create an endpoint, or update the one that has this URL; return it, and the secret of a new one.

        Raises SettingsError, ConflictError.
        """
        async with self._one_at_a_time:
            await self._catch_up()
            refuse_internal(values)
            id_ = values.get("id")
            same = self._of_url(values.get("url"))
            if same is not None:
                own = self._own(same.endpoint.id).endpoint.id
                if id_ is not None and id_ != own:
                    raise ConflictError(f"endpoint {own} has this URL: leave id out, or use {own}")
                return await self._update(same, {**values, "id": own}), None
            if id_ is None:
                id_ = f"ep_{secrets.token_hex(8)}"
            elif isinstance(id_, str) and id_ in self._registered:
                self._own(id_)
                raise ConflictError(f"endpoint {id_} is there with another URL: change it with PATCH")
            secret = (
                secret_of(secrets.token_bytes(SECRET_BYTES))
                if values.get("secret") is None
                else values["secret"]
            )
            return await self._keep({**values, "id": id_, "secret": secret}, paused=False), secret

    async def patch(self, id_: str, values: Settings) -> Registered:
        """Change some of an endpoint's settings; null gives one its default back.

        Raises SettingsError, ConflictError, UnknownEndpointError.
        """
        async with self._one_at_a_time:
            await self._catch_up()
            refuse_internal(values)
            registered = self._own(id_)
            if values.get("id", id_) != id_:
                raise ConflictError("an id cannot be changed: make another endpoint and remove this one")
            same = self._of_url(values.get("url"))
            if same is not None and same.endpoint.id != id_:
                raise ConflictError(f"endpoint {same.endpoint.id} has this URL already")
            return await self._update(registered, values)

    async def remove(self, id_: str) -> int:
        """Take an endpoint away; return how many of its deliveries were cancelled."""
        async with self._one_at_a_time:
            await self._catch_up()
            registered = self._own(id_)
            del self._registered[id_]
            self._change(self._subscriptions())
            health = await self._lanes.drop(id_)
            try:
                return await self._outbox.drop_endpoint(id_)
            except UnavailableError:
                self._registered[id_] = registered
                self._change(self._subscriptions())
                await self._lanes.keep(registered.endpoint, paused=registered.paused, health=health)
                raise

    async def pause(self, id_: str, *, paused: bool) -> Registered:
        """Hold back an endpoint's deliveries, or let them go again; the config's too."""
        async with self._one_at_a_time:
            await self._catch_up()
            registered = await self._take_effect(replace(self.get(id_), paused=paused))
            if not paused:
                await self._lanes.resume(id_)
            return registered

    async def rotate(self, id_: str, overlap_seconds: float) -> tuple[Registered, str]:
        """Give an endpoint a new secret; the older one goes on signing beside it for the overlap."""
        async with self._one_at_a_time:
            await self._catch_up()
            registered = self._own(id_)
            live: list[str] = (registered.settings or {})["secrets"]
            # A private key is followed by a private key: the endpoint's schemes could use no other.
            kind = PRIVATE_KEY if live[0].startswith(PRIVATE_KEY) else SHARED_KEY
            secret = secret_of(secrets.token_bytes(SECRET_BYTES), kind)
            return await self._update(registered, {"secret": secret}, overlap_seconds), secret

    async def end_overlaps(self) -> None:
        """Retire older secrets when their overlap is over; until cancelled."""
        while True:
            self._changed.clear()
            ends = [
                until for each in self._registered.values() if (until := each.overlap_until_ms) is not None
            ]
            await self._clock.wait(self._changed, min(ends, default=None))
            now_ms = self._clock.now_ms()
            try:
                async with self._one_at_a_time:
                    for each in self.all():
                        if each.overlap_until_ms is not None and each.overlap_until_ms <= now_ms:
                            await self._update(each, {})
            except (
                UnavailableError
            ):  # the older secret signs on until there is room to write that it does not
                await self._clock.wait(asyncio.Event(), now_ms + FULL_RETRY_MS)

    async def _update(
        self, registered: Registered, values: Settings, overlap_seconds: float = DEFAULT_OVERLAP_SECONDS
    ) -> Registered:
        settings = {**(registered.settings or {}), **values}
        live: list[str] = list((registered.settings or {})["secrets"])
        until_ms, now_ms = registered.overlap_until_ms, self._clock.now_ms()
        if until_ms is not None and until_ms <= now_ms:
            live, until_ms = live[:1], None
        secret = values.get("secret")
        if secret is not None and secret != live[0]:
            live = [secret, *live] if overlap_seconds else [secret]
            until_ms = max(until_ms or 0, now_ms + round(overlap_seconds * 1000)) if overlap_seconds else None
        if len(live) > MOST_SECRETS:
            raise ConflictError(f"{MOST_SECRETS} secrets are live already: wait for the end of their overlap")
        settings = {name: value for name, value in settings.items() if name != "secret"}
        return await self._keep(
            settings | {"secrets": live, "overlap_until_ms": until_ms}, paused=registered.paused
        )

    async def _keep(self, settings: Settings, *, paused: bool) -> Registered:
        """Read, keep, and put into effect."""
        return await self._take_effect(self._read(settings, paused=paused))

    async def _take_effect(self, registered: Registered) -> Registered:
        endpoint = registered.endpoint
        await self._outbox.keep_endpoint(kept_of(registered, self._aside))
        await self._lanes.keep(endpoint, paused=registered.paused)
        self._registered[endpoint.id] = registered
        self._change(self._subscriptions())
        self._changed.set()
        return registered

    def _read(self, settings: Settings, *, paused: bool) -> Registered:
        """Read settings as kept. Raises SettingsError."""
        given = {name: value for name, value in settings.items() if value is not None}
        until_ms = given.pop("overlap_until_ms", None)
        live = given.get("secrets") or [given["secret"]]
        try:
            endpoint = read_api_endpoint(given, self._defaults, self._policy)
        except SettingsError as error:
            # The caller knows of one secret only.
            problems = [(re.sub(r"^#/secrets(/0)?$", "#/secret", at), text) for at, text in error.problems]
            raise SettingsError(tuple(problems)) from None
        kept = {name: value for name, value in given.items() if name not in {"secret", "secrets"}}
        return Registered(
            endpoint=endpoint,
            paused=paused,
            settings=kept | {"secrets": live, "overlap_until_ms": until_ms},
            overlap_until_ms=until_ms,
        )

    def _own(self, id_: str) -> Registered:
        """Return an endpoint of the API, which may be changed. Raises also ConflictError."""
        registered = self.get(id_)
        if registered.settings is None:
            raise ConflictError(f"endpoint {id_} is the config's: change it there, then reload")
        return registered

    def _of_url(self, url: object) -> Registered | None:
        if not isinstance(url, str):
            return None
        wanted = compared(url)
        return next((each for each in self.all() if compared(each.endpoint.url) == wanted), None)

    def _subscriptions(self) -> Subscriptions:
        return Subscriptions(each.endpoint for each in self._registered.values())
