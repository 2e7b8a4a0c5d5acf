"""huey on SQLite, synced at every commit: a task that posts, and the application that enqueues it.

Set-up: `python -m tests.bench --setup huey`, which is `pip install huey requests` into .bench/venv.
huey takes a task out of the file before it runs it: one that is killed loses what its workers hold.
"""

import os

from huey import SqliteHuey

from tests.bench.compared.webhook import hand_over_as_ordered, post

huey = SqliteHuey(filename=os.environ["QUEUE"], fsync=True, results=False, timeout=30)


@huey.task(retries=3, retry_delay=5)
def deliver(event_id: str, body: str) -> None:
    post(event_id, body)


if __name__ == "__main__":
    # Imported as the consumer does it, because a task's name has its module in front.
    from tests.bench.compared import huey_sqlite  # noqa: PLW0406

    # A file has one writer at a time, so a second thread would only wait for the first.
    hand_over_as_ordered(huey_sqlite.deliver, threads=1)
