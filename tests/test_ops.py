"""The dashboard and the alert rules that come with the relay: true of a relay that runs."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.process import relay_process

ROOT = Path(__file__).parent.parent
OPS = ROOT / "relay" / "ops"
README = (ROOT / "README.md").read_text()
CONFIG = """
[[endpoints]]
id = "main"
url = "https://127.0.0.1:9/"
events = ["post.*"]
secret = "a secret of sixteen and more"
retry_schedule = []

[[sources]]
id = "away"
url = "postgresql://127.0.0.1:9/shop"
"""


def printed(what: str) -> str:
    command = [sys.executable, "-m", "relay", "ops", what]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[str, set[str], set[str]]]]:
    """Each family of a real relay's scrape: its type, the names of its samples, their labels."""
    with relay_process(
        tmp_path_factory.mktemp("relay"), CONFIG, {"RELAY_OUTBOX__MAX_PENDING": "1000"}
    ) as relay:
        relay.call("POST", "/v1/events", {"event": "post.published", "data": {}})
        text, deadline = "", time.monotonic() + 10
        while 'relay_dead_letters_total{endpoint="main"} 1.0' not in text:
            assert time.monotonic() < deadline, text
            _, text = relay.call("GET", "/metrics")
        yield {
            family.name + ("_total" if family.type == "counter" else ""): (
                family.type,
                {sample.name for sample in family.samples},
                {label for sample in family.samples for label in sample.labels} - {"le"},
            )
            for family in text_string_to_metric_families(str(text))
        }


def expressions() -> list[str]:
    groups = yaml.safe_load((OPS / "alerts.yaml").read_text())["groups"]
    rules = [rule["expr"] for group in groups for rule in group["rules"]]
    panels = json.loads((OPS / "grafana.json").read_text())["panels"]
    board = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    assert len(rules) > 15
    assert len(board) > 30
    return rules + board


@pytest.mark.parametrize(("what", "file"), [("grafana", "grafana.json"), ("alerts", "alerts.yaml")])
def test_the_command_prints_what_lies_in_the_package(what, file):
    assert printed(what) == (OPS / file).read_text()


def test_every_expression_is_promql_over_metrics_that_a_relay_has(families):
    """A panel or a rule over a name that is not there stays empty, and nobody notices."""
    there = {name for _, samples, _ in families.values() for name in samples}
    for expression in expressions():
        promql_parser.parse(expression.replace("$__rate_interval", "5m"))
        names = set(re.findall(r"\b(?:relay|process)_\w+", expression))
        assert names, expression
        assert names <= there, expression


def test_every_label_that_is_matched_or_grouped_by_is_there(families):
    labels = {label for _, _, labels in families.values() for label in labels} | {"instance", "le"}
    for expression in expressions():
        grouped = re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", expression)
        matched = re.findall(r"(\w+)\s*=?[=~!]~?\"", expression)
        used = {label.strip() for group in grouped for label in group.split(",")} | set(matched)
        assert used <= labels, expression


def test_the_rules_are_what_prometheus_reads():
    """The names of keys as promtool would check them, and durations with units."""
    for group in yaml.safe_load((OPS / "alerts.yaml").read_text())["groups"]:
        assert group.keys() == {"name", "rules"}
        alerts = [rule["alert"] for rule in group["rules"]]
        assert len(alerts) == len(set(alerts))
        for rule in group["rules"]:
            assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
            assert re.fullmatch(r"\d+[smh]", rule.get("for", "1s"))
            assert rule["labels"]["severity"] in {"info", "warning", "critical"}
            assert rule["annotations"].keys() == {"summary", "description"}
            for text in rule["annotations"].values():
                assert text.count("{{") == text.count("}}")


def test_the_dashboard_is_what_grafana_imports():
    board = json.loads((OPS / "grafana.json").read_text())
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
    assert len(places) == len(set(places))
    assert {each["name"] for each in board["templating"]["list"]} == {"datasource", "instance", "endpoint"}
    assert all(panel["description"] for panel in board["panels"] if panel["type"] != "row")


def test_the_readme_documents_every_metric_and_no_other(families):
    """Name, type and labels as a real scrape has them."""
    metrics = README.partition("\n## Metrics\n")[2].partition("\n## ")[0]  # the log has events of such names
    rows = re.findall(
        r"^\| `((?:relay|process)_\w+)` \| (\w+) \|([^|]*)\| ([^|]+) \|$", metrics, re.MULTILINE
    )
    documented = {name: (type_, set(re.findall(r"`(\w+)`", labels))) for name, type_, labels, _ in rows}
    real = {name: (type_, labels) for name, (type_, _, labels) in families.items()}
    assert documented == real
