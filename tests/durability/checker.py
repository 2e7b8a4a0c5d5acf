"""The judge of a run, afterwards and from its logs alone: `python -m tests.durability check FOLDER`.

Joined are what the driver was answered, what the receivers got and answered, what was done to the relay, and
the relay's own account of its attempts. Every number below that is named a fault must be 0 (the words are
those of Jepsen's total-queue checker); the others are told.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.durability.journal import Line, read
from tests.durability.timeline import crashes, failures, freezes

RECORD_MS = 2000  # an outcome is on disk this long after the answer, or the crash came between
EARLY_MS = 8  # clocks in whole milliseconds, on both sides
JITTER = 0.10
DRAIN_MARGIN_MS = 15_000  # a busy machine
# What an attempt may have met although the receiver has read it and means it as taken.
AMBIGUOUS = ("timeout", "conn_reset", "conn_closed", "protocol_error", "tls_error")

FAULTS = {
    "lost": "acknowledged, owed to an endpoint, neither delivered nor dead",
    "unexpected": "delivered, but never submitted, or refused",
    "unexplained_duplicates": "taken twice with no ambiguous attempt, crash or replay between",
    "body_mismatch": "not the bytes that were submitted",
    "bad_signature": "refused by one of two verifiers on arrival",
    "id_changes": "one event under several ids",
    "id_collisions": "several events under one id",
    "early_retries": "sent again before the schedule allows it",
    "too_many_attempts": "sent more often than the schedule allows",
    "misrecorded": "the relay's account of an attempt is not the receiver's",
    "unrecorded": "an attempt that the relay has no account of, without a crash",
    "undrained": "still pending long after the faults stopped",
    "orphans": "a dead letter without a reason, not listed, or not replayed",
    "inversions": "ordered events of one key out of the order of acceptance",
    "overlaps": "ordered events of one key on their way at the same time",
    "conflicts_taken": "other content taken under a key that was used",
    "undetected": "planted, and not found",
    "wrong_fan_out": "acknowledged for other endpoints than those subscribed",
}


@dataclass(slots=True)
class Request:
    """One request as the receivers' log has it; `answered` is None if nobody was there any more."""

    line: Line
    answered: int | None = None

    @property
    def at(self) -> int:
        return int(self.line["t"])

    @property
    def taken(self) -> bool:
        return self.line["status"] is not None and 200 <= self.line["status"] < 300

    @property
    def delay_ms(self) -> int:
        return round(self.line["delay"] * 1000)


@dataclass(slots=True)
class Report:
    """The figures of a run, and for each that is broken some examples."""

    figures: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    @property
    def broken(self) -> dict[str, int]:
        return {name: self.figures[name] for name in FAULTS if self.figures[name]}

    def fault(self, name: str, example: str) -> None:
        assert name in FAULTS
        self.figures[name] += 1
        if len(self.examples[name]) < 5:
            self.examples[name].append(example)

    def __str__(self) -> str:
        lines = [f"{name:24} {count}" for name, count in self.figures.items() if name not in FAULTS]
        lines += [f"{name:24} {self.figures[name]}" for name in FAULTS]
        lines += [
            f"BROKEN {name}: {FAULTS[name]}: {each}" for name in self.broken for each in self.examples[name]
        ]
        return "\n".join(lines)


def check(folder: Path) -> Report:
    return Run(folder).check()


class Run:
    """The logs of a run, joined."""

    def __init__(self, folder: Path) -> None:
        self.report = Report()
        self.posts: dict[int, Line] = {}
        self.acks: dict[int, list[Line]] = defaultdict(list)
        self.unknown: set[int] = set()
        for line in read(folder / "driver.jsonl"):
            self._read_driver(line)
        self.requests: dict[tuple[str, str], list[Request]] = defaultdict(list)  # by endpoint and id
        self._read_ledger(folder)
        self.faults = list(read(folder / "faults.jsonl"))
        self.plan = next(line["endpoints"] for line in self.faults if line["kind"] == "plan")
        self.crashes = crashes(self.faults)
        self.frozen = freezes(self.faults)
        self.failing = failures(self.faults)
        self.replays = [line for line in self.faults if line["kind"] == "replayed"]
        self.before = {story["id"]: story for story in read(folder / "before.jsonl")}
        self.stories = {story["id"]: story for story in read(folder / "after.jsonl")}
        self.order = {id_: place for place, id_ in enumerate(self.stories)}
        self.numbers = {ack["id"]: number for number, acks in self.acks.items() for ack in acks}

    def check(self) -> Report:
        figures = self.report.figures
        figures["submitted"] = len(self.posts)
        figures["acknowledged"] = len(self.acks)
        figures["requests"] = sum(len(requests) for requests in self.requests.values())
        figures["crashes"] = len(self.crashes)
        self._acknowledged()
        self._arrivals()
        self._ids()
        for (endpoint, id_), requests in self.requests.items():
            self._duplicates(endpoint, id_, requests)
            self._accounts(endpoint, id_, requests)
        for story in self.stories.values():
            for delivery in story["deliveries"]:
                self._schedule(story["id"], delivery)
        self._drain()
        self._dead_letters()
        for endpoint in self.plan:
            if endpoint["ordered"]:
                self._in_order(endpoint["id"])
        return self.report

    # The logs

    def _read_driver(self, line: Line) -> None:
        kind, number = line["kind"], line["n"]
        if kind == "post":
            self.posts.setdefault(number, line)
        elif kind == "ack":
            self.acks[number].append(line)
        elif kind == "unknown":
            self.unknown.add(number)
        elif kind == "conflict" and line["status"] < 300:
            self.report.fault("conflicts_taken", f"event {number}: {line['status']}")

    def _read_ledger(self, folder: Path) -> None:
        by_index: dict[int, Request] = {}
        for line in read(folder / "ledger.jsonl"):
            if line["kind"] == "request":
                request = by_index[line["index"]] = Request(line)
                self.requests[line["endpoint"], line["id"]].append(request)
            else:
                by_index[line["index"]].answered = line["t"]

    def _endpoint(self, id_: str) -> Mapping[str, Any]:
        return next(each for each in self.plan if each["id"] == id_)

    def _until(self, request: Request) -> int:
        """Return when the last crash can have come that kept this from being recorded.

        While the disk has no room outcomes wait for it.
        """
        last = request.answered if request.answered is not None else request.at + request.delay_ms
        last += RECORD_MS
        waited = [end + RECORD_MS for began, end in self.failing if began <= last and end >= request.at]
        return max([last, *waited])

    def _crashed(self, first_ms: int, last_ms: int) -> bool:
        return any(began <= last_ms and ended >= first_ms for began, ended in self.crashes)

    # Nothing lost, nothing invented

    def _acknowledged(self) -> None:
        for number, acks in self.acks.items():
            wanted = sorted(each["id"] for each in self.plan if wants(each, self.posts[number]["type"]))
            for ack in acks:
                if sorted(ack["endpoints"]) != wanted:
                    self.report.fault("wrong_fan_out", f"event {number}: {ack['endpoints']}")
            story = self.stories.get(acks[0]["id"])
            for endpoint in wanted:
                if story is None or not self._accounted(story, endpoint):
                    state = "not in the outbox" if story is None else states(story).get(endpoint)
                    self.report.fault("lost", f"event {number} for {endpoint}: {state}")

    def _accounted(self, story: Mapping[str, Any], endpoint: str) -> bool:
        """Tell whether a delivery arrived and was taken, or is kept as dead; pending is told elsewhere."""
        state = states(story).get(endpoint)
        taken = any(request.taken for request in self.requests[endpoint, story["id"]])
        return taken if state == "delivered" else state in {"dead", "pending"}

    def _arrivals(self) -> None:
        recovered = set()
        for (endpoint, id_), requests in self.requests.items():
            for request in requests:
                number = request.line["n"]
                post = self.posts.get(number)
                if post is None or not (number in self.acks or number in self.unknown):
                    self.report.fault("unexpected", f"{id_} at {endpoint}, event {number}")
                    continue
                if number not in self.acks:
                    recovered.add(number)
                if request.line["sha256"] != post["sha256"]:
                    self.report.fault("body_mismatch", f"{id_} at {endpoint}, event {number}")
                if not all(request.line["verdicts"]):
                    self.report.fault("bad_signature", f"{id_} at {endpoint}: {request.line['verdicts']}")
        self.report.figures["recovered"] = len(recovered)

    def _ids(self) -> None:
        ids: dict[int, set[str]] = defaultdict(set)
        numbers: dict[str, set[int]] = defaultdict(set)
        pairs = [(number, ack["id"]) for number, acks in self.acks.items() for ack in acks]
        pairs += [(each.line["n"], each.line["id"]) for found in self.requests.values() for each in found]
        for number, id_ in pairs:
            ids[number].add(id_)
            numbers[id_].add(number)
        for number, several in ids.items():
            if len(several) > 1:
                self.report.fault("id_changes", f"event {number}: {sorted(several)}")
        for id_, several in numbers.items():
            if len(several) > 1:
                self.report.fault("id_collisions", f"{id_}: {sorted(several)}")

    # Twice only with a cause

    def _duplicates(self, endpoint: str, id_: str, requests: list[Request]) -> None:
        taken = [request for request in requests if request.taken]
        self.report.figures["duplicates"] += max(0, len(taken) - 1)
        for request, following in pairwise(requests):
            if request.taken and not self._explained(endpoint, id_, request, following):
                self.report.fault(
                    "unexplained_duplicates",
                    f"{id_} at {endpoint}: taken at attempt {request.line['attempt']}, "
                    f"then came attempt {following.line['attempt']} {following.at - request.at} ms later",
                )

    def _explained(self, endpoint: str, id_: str, request: Request, following: Request) -> bool:
        if any(line["endpoint"] == endpoint and line["t"] <= following.at for line in self.replays):
            return True
        if following.line["attempt"] == request.line["attempt"]:
            # Nothing was recorded of it: only a crash before that could be explains this.
            return self._crashed(request.at, min(self._until(request), following.at))
        account = self._account(id_, endpoint, request.line["attempt"])
        if account is not None and milliseconds(account["at"]) > request.at + EARLY_MS:
            # It is of a later attempt of the same number, after one that nothing was recorded of.
            return self._crashed(request.at, min(self._until(request), milliseconds(account["at"])))
        if account is None or account["error"] not in AMBIGUOUS:
            return False
        timeout_ms = self._endpoint(endpoint)["timeout_ms"]
        if account["error"] == "timeout" and account["milliseconds"] >= timeout_ms * 0.9:
            return True  # on a busy machine either side can be the late one
        answered = request.answered if request.answered is not None else following.at
        stalled = any(began <= answered and ended >= request.at for began, ended in self.frozen)
        return (
            stalled
            or answered - request.at >= timeout_ms / 2
            or self._crashed(request.at, self._until(request))
        )

    # The relay's own account

    def _account(self, id_: str, endpoint: str, attempt: int) -> Mapping[str, Any] | None:
        for delivery in self.stories.get(id_, {"deliveries": ()})["deliveries"]:
            if delivery["endpoint"] == endpoint:
                return next((each for each in delivery["attempts"] if each["number"] == attempt), None)
        return None

    def _accounts(self, endpoint: str, id_: str, requests: list[Request]) -> None:
        """Compare what the relay says of each attempt with what the receiver says."""
        last = {request.line["attempt"]: request for request in requests}
        for attempt, request in last.items():
            account = self._account(id_, endpoint, attempt)
            if account is None:
                if id_ in self.stories and not self._crashed(request.at, self._until(request)):
                    self.report.fault("unrecorded", f"{id_} at {endpoint}: attempt {attempt}")
            elif account["status"] is not None and account["status"] != request.line["status"]:
                self.report.fault(
                    "misrecorded",
                    f"{id_} at {endpoint}: attempt {attempt} was answered {request.line['status']}, "
                    f"recorded is {account['status']}",
                )
            elif account["error"] is None and not request.taken:
                self.report.fault("misrecorded", f"{id_} at {endpoint}: attempt {attempt} was not taken")

    def _schedule(self, id_: str, delivery: Mapping[str, Any]) -> None:
        endpoint, attempts = delivery["endpoint"], delivery["attempts"]
        name = f"{id_} at {endpoint}"
        schedule = self._endpoint(endpoint)["schedule_ms"]
        replays = [line["t"] for line in self.replays if line["endpoint"] == endpoint]
        if [each["number"] for each in attempts] != list(range(1, len(attempts) + 1)):
            numbers = [each["number"] for each in attempts]
            self.report.fault("unrecorded", f"{name}: attempts {numbers}")
        if any(count > 1 + len(schedule) for count in between(attempts, replays)):
            self.report.fault("too_many_attempts", f"{name}: {len(attempts)}")
        came = {each.line["attempt"] for each in self.requests[endpoint, id_]}
        for each in attempts:
            if each["status"] is not None and each["number"] not in came:
                self.report.fault("misrecorded", f"{name}: attempt {each['number']} never came")
        for step, (earlier, later) in enumerate(pairwise(attempts)):
            ended, began = milliseconds(earlier["at"]) + earlier["milliseconds"], milliseconds(later["at"])
            if any(began >= at - EARLY_MS for at in replays):
                break  # by hand, and the schedule starts again
            due = ended + schedule[min(step, len(schedule) - 1)] * (1 - JITTER)
            if began < due - EARLY_MS:
                self.report.fault(
                    "early_retries", f"{name}: attempt {step + 2} was {due - began:.0f} ms early"
                )

    # What comes after

    def _drain(self) -> None:
        at = {line["kind"]: line["t"] for line in self.faults if line["kind"] in ("settling", "drained")}
        longest = max(
            max(each["schedule_ms"], default=0) * (1 + JITTER) + 2 * each["timeout_ms"] for each in self.plan
        )
        took = at.get("drained", float("inf")) - at["settling"]
        if took > longest + DRAIN_MARGIN_MS:
            self.report.fault("undrained", f"{took} ms")
        else:
            self.report.figures["time_to_drain_ms"] = int(took)
        for story in self.stories.values():
            for endpoint, state in states(story).items():
                if state == "pending":
                    self.report.fault("undrained", f"{story['id']} at {endpoint}")

    def _dead_letters(self) -> None:
        dead: Counter[str] = Counter()
        for story in self.before.values():
            for delivery in story["deliveries"]:
                if delivery["state"] == "dead":
                    dead[delivery["endpoint"]] += 1
                    if not delivery["attempts"] or not delivery["attempts"][-1]["error"]:
                        self.report.fault("orphans", f"{story['id']} at {delivery['endpoint']}: no reason")
        self.report.figures["dead"] = dead.total()
        for line in self.replays:
            if not line["count"] == line["dead"] == dead[line["endpoint"]]:
                self.report.fault(
                    "orphans",
                    f"{line['endpoint']}: {dead[line['endpoint']]} listed, {line['dead']} counted, "
                    f"{line['count']} replayed",
                )
            self.report.figures["replayed"] += line["count"]

    # In order

    def _in_order(self, endpoint: str) -> None:
        """Under `order = "key"`: the first success of each, in the order of acceptance, one at a time."""
        keys: dict[str, list[tuple[int, list[Request]]]] = defaultdict(list)
        for id_, place in self.order.items():
            requests = self.requests.get((endpoint, id_))
            post = self.posts.get(requests[0].line["n"]) if requests else None
            if requests and post is not None and post["order"] is not None:
                keys[post["order"]].append((place, requests))
        self._accepted_in_order()
        for key, events in keys.items():
            self._key_in_order(endpoint, key, events)

    def _key_in_order(self, endpoint: str, key: str, events: list[tuple[int, list[Request]]]) -> None:
        replay = min((each["t"] for each in self.replays if each["endpoint"] == endpoint), default=None)
        over, latest, before = -1, -1, ""
        for _, requests in events:
            mine = [each for each in requests if replay is None or each.at < replay]
            if not mine:
                continue
            name = mine[0].line["id"]
            success = next((each for each in mine if each.taken), None)
            if success is not None and success.at < latest:
                self.report.fault("inversions", f"{key}: {name} was taken before {before}")
            if mine[0].at < over:
                self.report.fault("overlaps", f"{key}: {name} came before the end of {before}")
            # It is over with its first success, or with the last attempt if it was given up.
            end = success or mine[-1]
            over = max(over, end.answered if end.answered is not None else end.at)
            latest, before = max(latest, success.at if success is not None else -1), name

    def _accepted_in_order(self) -> None:
        """Check that what was posted after another was acknowledged was accepted after it."""
        latest = -1
        events: list[tuple[int, int, int]] = []  # time, 0 for an ack and 1 for a post, place
        for number, acks in self.acks.items():
            place = self.order.get(acks[0]["id"])
            if place is None:
                continue
            first = min(ack["t"] for ack in acks)
            events += [(self.posts[number]["t"], 0, place), (first, 1, place)]
        for _, what, place in sorted(events):
            if what == 1:
                latest = max(latest, place)
            elif place < latest:
                self.report.fault("inversions", f"accepted at place {place}, after {latest}")


def wants(endpoint: Mapping[str, Any], type_: str) -> bool:
    return any(
        each in ("*", type_) or (each.endswith(".*") and type_.startswith(each[:-1]))
        for each in endpoint["events"]
    )


def states(story: Mapping[str, Any]) -> dict[str, str]:
    return {delivery["endpoint"]: delivery["state"] for delivery in story["deliveries"]}


def between(attempts: list[Mapping[str, Any]], replays: list[int]) -> list[int]:
    """Count the attempts of each schedule: every replay starts it anew."""
    counts = Counter(sum(milliseconds(each["at"]) >= at - EARLY_MS for at in replays) for each in attempts)
    return list(counts.values())


def milliseconds(at: str) -> int:
    return round(datetime.fromisoformat(at).timestamp() * 1000)


def merged(reports: Iterator[Report] | list[Report]) -> Report:
    """Add up the figures of several runs."""
    total = Report()
    for report in reports:
        total.figures.update(report.figures)
        for name, examples in report.examples.items():
            total.examples[name] += examples
    return total
