"""Celery with Redis: a task that posts, and the application that delays it.

Set-up: `python -m tests.bench --setup celery`, which is
`apt-get install redis-server` and `pip install 'celery[redis]' requests` into .bench/venv.
"""

import os

from celery import Celery

from tests.bench.compared.webhook import hand_over_as_ordered, post

THREADS = 4  # of the application; more hand over no faster, as they share one GIL

app = Celery(broker=os.environ["BROKER"])
app.conf.update(
    task_ignore_result=True,
    worker_send_task_events=False,
    broker_connection_retry_on_startup=True,
    # With the second a task is not lost with its worker; without, as it is by default, it is.
    task_acks_late=os.environ["DURABLE"] == "1",
    task_reject_on_worker_lost=os.environ["DURABLE"] == "1",
)


@app.task(
    name="deliver", autoretry_for=(OSError,), max_retries=3, retry_backoff=5
)  # requests' errors are OSErrors
def deliver(event_id: str, body: str) -> None:
    post(event_id, body)


if __name__ == "__main__":
    hand_over_as_ordered(deliver.delay, threads=THREADS)
