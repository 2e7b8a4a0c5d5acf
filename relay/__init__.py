"""relay: a webhook sidecar. This is the map: an event's way through these files, in order.

An application posts an event on localhost.

    api/          takes it over HTTP: who may talk to us, is it JSON, what is the answer
    sources/      takes it from an application's own PostgreSQL, where a transaction left it
    cloudevents.py  reads one that is written as a CloudEvent
    canonical.py  gives its data the bytes that JavaScript would write
    ingest.py     makes it an event, with one delivery for each endpoint that wants it
    catalogue.py  knows the types of events, their samples and schemas
    subscription.py  knows which endpoints want a type
    outbox/       keeps both, in a file or in PostgreSQL, before the 202, and everything that follows
    delivery.py   a lane for each endpoint,
    lane.py       which takes what is due, as fast as it may
    surroundings.py  and what all lanes share
    pace.py       says how many at once, and how many a second
    formats.py    the body it is sent with
    signing.py    the headers that prove where it comes from
    sender.py     makes one attempt, and tells what it met
    dialling.py   makes the connection, through a proxy where there is one
    lookup.py     finds the addresses of a name
    egress.py     judges every address before it is dialled
    tls.py        what a connection shows and trusts
    retry.py      decides what follows: delivered, again later, dead
    health.py     and how the endpoint stands: up, down, gone
    report.py     says so in the log, and to whoever subscribed to the relay's own events
    retention.py  forgets what is old and over
    recent.py     counts what happened lately, for whoever looks

Around that:

    __main__.py, cli/  the command line, the only place that prints
    page/         the status page: what it shows, its style and its script
    serve.py      builds and joins all of these; starts downwards, stops upwards
    listening.py  where requests are taken: sockets, and who serves them
    config/       a TOML file in, frozen objects out
    endpoints.py  the endpoints there are, and how those of the API change
    registered.py  one of them, as it is registered
    reload.py     reads the config again while everything goes on
    alike.py      tells whether two readings of an endpoint are the same
    reach.py      connects to an endpoint and sends nothing: `relay check --connect`
    rehearsal.py  a sample sent now and kept nowhere: the test event
    stopping.py   takes the signals to stop
    systemd.py    tells the service manager how the relay stands
    clock.py      what time it is, and waiting for a time
    logs.py       the relay's own log
    about.py      what runs: the versions
    metrics/      what is counted, and how a scrape shows it
    traces/       what a trace is told of submissions and attempts
    ops/          a dashboard and alert rules of these metrics
    model.py      the words: event, endpoint, delivery, attempt, outcome, verdict

Data goes forward only; the one signal backwards is `wake`.
"""

__version__ = "0.1.0"
