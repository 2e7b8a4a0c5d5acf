"""`relay reload`: the running relay reads its config again; what that changed is told."""

import sys
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from relay.cli.ask import refusal
from relay.cli.client import call
from relay.cli.exits import Exit
from relay.cli.output import show_json


def reload(arguments: Namespace) -> int:
    status, answer = call("POST", "/v1/reload", url=arguments.url)
    if status == 422:  # told as `relay check` tells them
        refused([each["detail"] for each in answer["errors"]], as_json=arguments.json)
        return Exit.CONFIG
    if status >= 400:
        raise refusal(status, answer)
    if arguments.json:
        show_json({"ok": True, **answer})
    else:
        tell(answer)
    return Exit.DONE


def refused(problems: list[str], *, as_json: bool) -> None:
    if as_json:
        show_json({"ok": False, "problems": problems})
    else:
        print("\n".join(problems), file=sys.stderr)


def tell(answer: Mapping[str, Any]) -> None:
    for name in ("added", "changed", "removed", "set_aside"):
        if answer[name]:
            print(f"{name.replace('_', ' ')}: {', '.join(answer[name])}")
    if answer["cancelled"]:
        print(f"cancelled: {answer['cancelled']} deliveries")
    if not any(answer.values()):
        print("no endpoint has changed")
    if answer["needs_restart"]:
        print(f"waits for a restart: {', '.join(answer['needs_restart'])}", file=sys.stderr)
