"""Every command of the relay, one entry each: what it does, what it takes, and where it is written.

The parser, the help and the dispatch are made of this table. The functions are named and not imported,
so that a command loads only what it needs: those that talk to a running relay start in under 100 ms.
"""

from typing import NamedTuple

from relay.cli import arguments
from relay.cli.options import CONFIG, HEADER_SCHEME, JSON, SECRET_FILE, TIMES, URL, Option, option


class Command(NamedTuple):
    """One command; two words in the name are a group and its member."""

    name: str
    does: str  # one sentence, the first line of its help
    runs: str  # "module:function"; the function takes the parsed arguments and returns the exit code
    examples: tuple[str, str]
    options: tuple[Option, ...] = ()


ACTIONS = ("list", "pause", "resume", "remove", "rotate-secret")

EXAMPLES = ("relay demo", "relay serve --config relay.toml")

GROUPS = {
    "secret": "Make the secrets that deliveries are signed with.",
    "ops": "Print what comes with the relay for Prometheus, Grafana and PostgreSQL.",
}

COMMANDS = (
    Command(
        name="serve",
        does="Run the relay until SIGTERM or Ctrl-C.",
        runs="relay.cli.serving:serve",
        options=(CONFIG,),
        examples=("relay serve", "relay serve --config /etc/relay/relay.toml"),
    ),
    Command(
        name="check",
        does="Check the config and tell every mistake with its line.",
        runs="relay.cli.serving:check",
        options=(
            CONFIG,
            option(
                "--connect",
                action="store_true",
                help="then connect to each endpoint and verify its certificate, and look at each source; "
                "nothing is sent",
            ),
            JSON,
        ),
        examples=("relay check --connect", "relay check --config relay.toml --json"),
    ),
    Command(
        name="demo",
        does="Show everything at work on this machine: a relay, a receiver, five events and what arrived.",
        runs="relay.cli.demo:demo",
        options=(JSON,),
        examples=("relay demo", "relay demo --json"),
    ),
    Command(
        name="listen",
        does="Receive deliveries on this machine, verify their signatures and print one line for each.",
        runs="relay.cli.listen:listen",
        options=(
            option("--port", type=arguments.port, default=8900, help="0 takes any free one (default: 8900)"),
            SECRET_FILE,
            HEADER_SCHEME,
            option(
                "--answer",
                metavar="STATUS[@DELAY][+SECONDS],…",
                type=arguments.answers,
                default=[],
                help="what to answer the first requests: 503; after a delay (ms, s, m) 503@2s; with "
                "Retry-After 429+30; with both 503@2s+30; all that follow are answered 200 at once",
            ),
            option("--cert", metavar="PATH", help="its certificate (PEM), for https (default: http)"),
            option("--key", metavar="PATH", help="the certificate's key (default: it is in the same file)"),
            option("--count", metavar="N", type=arguments.count, help="end after so many requests"),
            JSON,
        ),
        examples=(
            "relay listen --secret-file secret.txt --answer 503,503,200",
            "relay listen --cert cert.pem --key key.pem --answer 503@2s,429+30",
        ),
    ),
    Command(
        name="verify",
        does="Check the signatures of a captured request and tell which part of it disagrees.",
        runs="relay.cli.verify:verify",
        options=(
            option(
                "--header",
                metavar="NAME: VALUE",
                action="append",
                default=[],
                help="a header as it arrived; can be repeated",
            ),
            option("--headers-file", metavar="PATH", help="a file with all headers, one a line"),
            option(
                "--body",
                metavar="PATH",
                default="-",
                help="its body, byte for byte (default: standard input)",
            ),
            SECRET_FILE,
            HEADER_SCHEME,
            option("--at", metavar="TIME", help="when it arrived (RFC 3339; default: now)"),
            JSON,
        ),
        examples=(
            "relay verify --headers-file headers.txt --body body.json --secret-file secret.txt",
            "relay verify --header 'X-SocialSyncerAPI-Signature: 5d41…' --body body.json",
        ),
    ),
    Command(
        name="healthcheck",
        does="Tell by the exit code whether the relay is ready, for a container's probe.",
        runs="relay.cli.health:healthcheck",
        options=(
            option(
                "--url",
                help="where the relay listens, http://HOST:PORT or unix:/PATH "
                "(default: $RELAY_URL, else server.listen of the config, else http://127.0.0.1:8484)",
            ),
            CONFIG,
        ),
        examples=("relay healthcheck", "relay healthcheck --url unix:/run/relay/relay.sock"),
    ),
    Command(
        name="send",
        does="Submit an event and print its id.",
        runs="relay.cli.ask:send",
        options=(
            option("event", metavar="EVENT", help="its type"),
            option(
                "--data", metavar="JSON", default="{}", help="its data: JSON, @file, or - for standard input"
            ),
            option("--key", help="its ordering key"),
            option(
                "--to", action="append", metavar="ENDPOINT", help="only to this endpoint; can be repeated"
            ),
            option("--idempotency-key", metavar="KEY", help="submit it once, however often this is called"),
            URL,
            JSON,
        ),
        examples=(
            """relay send post.published --data '{"postId": "post_abc123"}'""",
            "relay send post.published --data @post.json --idempotency-key post_abc123",
        ),
    ),
    Command(
        name="test",
        does="Send an event's sample to its endpoints now, once, and tell what they answered.",
        runs="relay.cli.ask:test",
        options=(
            option("event", metavar="EVENT", help="a type of the catalogue"),
            option("--endpoint", metavar="ID", help="only to this one"),
            URL,
            JSON,
        ),
        examples=("relay test post.published", "relay test post.published --endpoint main"),
    ),
    Command(
        name="status",
        does="Tell how the relay and its endpoints stand.",
        runs="relay.cli.status:status",
        options=(
            option("--watch", action="store_true", help="until Ctrl-C, with accepted and delivered a second"),
            option(
                "--interval",
                metavar="DURATION",
                type=arguments.interval,
                help="how often --watch looks (default: 1s on a terminal, else 10s)",
            ),
            URL,
            JSON,
        ),
        examples=("relay status --watch", "relay status --json"),
    ),
    Command(
        name="drain",
        does="Wait until nothing is pending, and tell how far it has come.",
        runs="relay.cli.drain:drain",
        options=(
            option(
                "--timeout",
                metavar="DURATION",
                type=arguments.duration,
                help="give up after this time with exit code 75 (default: never)",
            ),
            URL,
            JSON,
        ),
        examples=("relay drain", "relay drain --timeout 5m"),
    ),
    Command(
        name="backup",
        does="Copy the running relay's outbox into a file, consistent and whole.",
        runs="relay.cli.backup:backup",
        options=(
            option(
                "file", metavar="FILE", help="where to; a backup there is replaced once the new one is whole"
            ),
            URL,
            JSON,
        ),
        examples=("relay backup /var/backups/relay.db", 'relay backup "relay-$(date +%F).db"'),
    ),
    Command(
        name="move",
        does="Move the outbox from its SQLite file into PostgreSQL, while no relay runs on it.",
        runs="relay.cli.move:move",
        options=(
            option(
                "--to",
                metavar="URL",
                help="the database, as outbox.url names it: postgresql://USER@HOST/DATABASE; "
                "a password as ${env:NAME}, or from $PGPASSWORD or ~/.pgpass",
            ),
            option(
                "--undo",
                action="store_true",
                help="let the file be an outbox again, as it was when it was moved",
            ),
            CONFIG,
            JSON,
        ),
        examples=(
            "relay move --to 'postgresql://relay:${env:DATABASE_PASSWORD}@db.internal/relay'",
            "relay move --undo --config relay.toml",
        ),
    ),
    Command(
        name="reload",
        does="Let the running relay read its config again; one with mistakes changes nothing.",
        runs="relay.cli.reload:reload",
        options=(URL, JSON),
        examples=("relay reload", "relay reload --url unix:/run/relay/relay.sock"),
    ),
    Command(
        name="events",
        does="List events, newest first.",
        runs="relay.cli.ask:events",
        options=(
            option("--event", metavar="EVENT", help="of this type"),
            option("--endpoint", metavar="ID", help="owed to this endpoint"),
            option("--state", help="pending, delivered, dead or cancelled"),
            *TIMES,
            option(
                "--limit", metavar="N", type=arguments.count, default=50, help="at most so many (default: 50)"
            ),
            URL,
            JSON,
        ),
        examples=("relay events", "relay events --endpoint main --state dead --since 2026-01-15T10:00:00Z"),
    ),
    Command(
        name="show",
        does="Tell one event's whole story.",
        runs="relay.cli.ask:show",
        options=(option("id", metavar="ID", help="the event's id"), URL, JSON),
        examples=("relay show evt_0190a5b2c3d4", "relay show evt_0190a5b2c3d4 --json"),
    ),
    Command(
        name="replay",
        does="Send again one event, or what an endpoint missed.",
        runs="relay.cli.ask:replay",
        options=(
            option("id", metavar="ID", nargs="?", help="an event's id"),
            option(
                "--endpoint", metavar="ID", help="only to this one; without an event's id all that it missed"
            ),
            option("--state", help="dead (the default), cancelled or delivered"),
            option("--event", metavar="EVENT", help="of this type"),
            *TIMES,
            option("--rate", help='no faster than this, like "50/s"'),
            option("--dry-run", action="store_true", help="only count"),
            URL,
            JSON,
        ),
        examples=("relay replay evt_0190a5b2c3d4", "relay replay --endpoint main --rate 50/s --dry-run"),
    ),
    Command(
        name="endpoints",
        does="List endpoints; pause, resume or remove one, or give it a new secret.",
        runs="relay.cli.ask:endpoints",
        options=(
            option("action", nargs="?", choices=ACTIONS, default="list", help="what to do (default: list)"),
            option("id", metavar="ID", nargs="?", help="the endpoint"),
            option(
                "--overlap", metavar="DURATION", help="how long the older secret still signs (default: 24h)"
            ),
            URL,
            JSON,
        ),
        examples=("relay endpoints", "relay endpoints rotate-secret main --overlap 1h"),
    ),
    Command(
        name="secret new",
        does="Make a new secret and print it.",
        runs="relay.cli.secret:new",
        options=(
            option(
                "--ed25519",
                action="store_true",
                help="a key pair: whsk_… to sign standard-ed25519 with, its public whpk_… on standard error",
            ),
            JSON,
        ),
        examples=("relay secret new > secret.txt", "relay secret new --ed25519 --json"),
    ),
    Command(
        name="ops grafana",
        does="Print a Grafana dashboard of the relay's metrics, as JSON to import.",
        runs="relay.cli.ops:grafana",
        examples=("relay ops grafana > relay.json", "relay ops grafana | jq .panels[].title"),
    ),
    Command(
        name="ops alerts",
        does="Print alert rules for Prometheus, as YAML.",
        runs="relay.cli.ops:alerts",
        examples=("relay ops alerts > relay.rules.yaml", "relay ops alerts | promtool check rules"),
    ),
    Command(
        name="ops submit-sql",
        does="Print the SQL that lets an application submit events inside its own transactions.",
        runs="relay.cli.ops:submit_sql",
        options=(
            option("--schema", default="public", help="where function and table are made (default: public)"),
            option(
                "--portable",
                action="store_true",
                help="without NOTIFY and storage parameters, for engines that are like PostgreSQL",
            ),
        ),
        examples=(
            "relay ops submit-sql > migrations/0042_relay_submit.sql",
            'relay ops submit-sql --schema events | psql "$DATABASE_URL"',
        ),
    ),
    Command(
        name="completion",
        does="Print the script that lets a shell complete the relay's commands and options.",
        runs="relay.cli.completion:completion",
        options=(
            option("shell", metavar="SHELL", choices=("bash", "zsh", "fish"), help="bash, zsh or fish"),
        ),
        examples=(
            "relay completion bash > ~/.local/share/bash-completion/completions/relay",
            "relay completion zsh > ~/.zfunc/_relay",
        ),
    ),
    Command(
        name="version",
        does="Print the versions of the relay and of what it runs on.",
        runs="relay.cli.version:version",
        options=(JSON,),
        examples=("relay version", "relay version --json"),
    ),
)
