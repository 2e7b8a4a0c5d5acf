"""What teams use today to send webhooks, for `python -m tests.bench --compare`.

Each is one application that hands over events and whatever brings them to the receiver. All send the same
events to the same https receiver with the same signature (Standard Webhooks) over kept connections.

    rivals.py         who they are, how each is started, with which settings, and what it may cost
    setup.py          what they need, installed into .bench (never into the environment of the relay)
    webhook.py        the signed POST of the Python ones, and the loop of their applications
    relay_app.py      an application that posts to the relay
    celery_redis.py huey_sqlite.py bullmq_redis.mjs     application and worker of each
"""
