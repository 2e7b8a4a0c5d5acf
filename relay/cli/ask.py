"""Commands that ask a running relay over its API: send, test, events, show, replay, endpoints."""

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from relay.cli.client import call
from relay.cli.exits import CommandError, Exit
from relay.cli.output import printable, show_json, show_table

PAGE = 200


def ask(arguments: Namespace, method: str, path: str, content: object = None, **options: Any) -> Any:
    """Return the answer of a call that succeeded. Raises CommandError with what the relay said."""
    status, answer = call(method, path, content, url=arguments.url, **options)
    if status < 400:
        return answer
    raise refusal(status, answer)


def refusal(status: int, answer: Any) -> CommandError:
    """Put what the relay said into one sentence."""
    problem = answer if isinstance(answer, dict) else {}
    mistakes = [f"{each['pointer']} {each['detail']}" for each in problem.get("errors", [])]
    sentence = "; ".join(mistakes) or str(problem.get("detail") or f"the relay answered {status}")
    return CommandError(sentence + (" (the token is taken from $RELAY_TOKEN)" if status == 401 else ""))


def send(arguments: Namespace) -> int:
    event = {"event": arguments.event, "data": read_data(arguments.data)}
    event |= {name: value for name in ("key", "to") if (value := getattr(arguments, name)) is not None}
    key = arguments.idempotency_key
    headers = {"Idempotency-Key": key} if key is not None else {}
    receipt = ask(arguments, "POST", "/v1/events", event, headers=headers)
    if arguments.json:
        show_json(receipt)
    else:
        print(receipt["id"])
    return Exit.DONE


def read_data(given: str) -> object:
    try:
        if given == "-":
            return json.loads(sys.stdin.read())
        return json.loads(Path(given[1:]).read_text() if given.startswith("@") else given)
    except OSError as error:
        raise CommandError(f"--data: {given[1:]} cannot be read: {error.strerror}", Exit.USAGE) from None
    except ValueError as error:
        raise CommandError(f"--data is not JSON: {error}", Exit.USAGE) from None


def test(arguments: Namespace) -> int:
    wanted = {"event": arguments.event}
    if arguments.endpoint is not None:
        wanted["endpoint"] = arguments.endpoint
    answer = ask(arguments, "POST", "/v1/webhooks/test", wanted)
    if arguments.json:
        show_json(answer)
    else:
        show_table(("endpoint", "ok", "status", "milliseconds", "error"), answer["data"])
    return Exit.DONE if all(each["ok"] for each in answer["data"]) else Exit.FAILED


def events(arguments: Namespace) -> int:
    filters = {name: getattr(arguments, name) for name in ("event", "endpoint", "state", "since", "until")}
    found: list[dict[str, Any]] = []
    cursor = None
    while len(found) < arguments.limit:
        query = filters | {"limit": min(arguments.limit - len(found), PAGE), "cursor": cursor}
        given = {name: value for name, value in query.items() if value is not None}
        page = ask(arguments, "GET", f"/v1/events?{urlencode(given)}")
        found += page["data"]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    if arguments.json:
        show_json({"data": found, "next_cursor": cursor})
    else:
        rows = [
            each | {"deliveries": [summed(delivery) for delivery in each["deliveries"]]} for each in found
        ]
        show_table(("id", "event", "accepted_at", "deliveries"), rows)
    return Exit.DONE


def summed(delivery: dict[str, Any]) -> str:
    attempts = len(delivery["attempts"])
    return f"{delivery['endpoint']} {delivery['state']} ({attempts} attempt{'' if attempts == 1 else 's'})"


def show(arguments: Namespace) -> int:
    story = ask(arguments, "GET", f"/v1/events/{arguments.id}")
    if arguments.json:
        show_json(story)
        return Exit.DONE
    for name in ("id", "event", "timestamp", "accepted_at"):
        print(f"{name:12} {printable(story[name])}")
    print(f"{'data':12} {json.dumps(story['data'])}")
    for delivery in story["deliveries"]:
        following = delivery["next_attempt_at"]
        print(f"\n{delivery['endpoint']}: {delivery['state']}" + (f", next {following}" if following else ""))
        if delivery["attempts"]:
            columns = ("number", "at", "status", "milliseconds", "error", "answer")
            show_table(columns, delivery["attempts"])
    return Exit.DONE


def replay(arguments: Namespace) -> int:
    if arguments.id is not None:
        wanted = {"endpoint": arguments.endpoint} if arguments.endpoint is not None else {}
        answer = ask(arguments, "POST", f"/v1/events/{arguments.id}/replay", wanted)
    elif arguments.endpoint is not None:
        names = ("state", "event", "since", "until", "rate")
        wanted = {name: value for name in names if (value := getattr(arguments, name)) is not None}
        path = f"/v1/webhooks/settings/{arguments.endpoint}/replay"
        answer = ask(arguments, "POST", path, wanted | {"dry_run": arguments.dry_run})
    else:
        raise CommandError("name an event's id or an --endpoint", Exit.USAGE)
    if arguments.json:
        show_json(answer)
    else:
        print(f"{answer['count']} {'would be' if answer.get('dry_run') else 'are'} sent again")
    return Exit.DONE


def endpoints(arguments: Namespace) -> int:
    action = arguments.action
    if action == "list":
        answer = ask(arguments, "GET", "/v1/webhooks/settings")
        if arguments.json:
            show_json(answer)
        else:
            show_table(("id", "url", "events", "source", "state", "pending", "dead"), answer["data"])
        return Exit.DONE
    if arguments.id is None:
        raise CommandError(f"name the endpoint: relay endpoints {action} ID", Exit.USAGE)
    path = f"/v1/webhooks/settings/{arguments.id}"
    if action == "remove":
        answer = ask(arguments, "DELETE", path)
        said = f"{arguments.id} removed, {answer.get('cancelled')} deliveries cancelled"
    elif action == "rotate-secret":
        wanted = {"overlap": arguments.overlap} if arguments.overlap is not None else {}
        answer = ask(arguments, "POST", f"{path}/{action}", wanted)
        said = str(answer.get("secret"))
    else:
        answer = ask(arguments, "POST", f"{path}/{action}")
        said = f"{arguments.id} is {answer.get('state')}"
    if arguments.json:
        show_json(answer)
    else:
        print(said)
    return Exit.DONE
