"""That the dashboard's queries and the alerts parse, and ask for series and tags that there are."""

import json
import re
from pathlib import Path

import promql_parser as promql
import pytest
import yaml
from promql_parser import AggregateExpr, BinaryExpr, VectorSelector

from asynception.monitoring import ray_metrics

GRAFANA = Path(__file__).resolve().parents[2] / "deploy" / "grafana"
PREFIX = "ray_asynception_"


def panels():
    dashboard = json.loads((GRAFANA / "dashboard.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield f"{panel['title']} {target['refId']}", target["expr"]


def alerts():
    for group in yaml.safe_load((GRAFANA / "alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]


ASKED = [pytest.param(query, id=name) for name, query in (*panels(), *alerts())]


def exported():
    """Tags of each series that a run's metrics become, by its name at Prometheus."""
    tags = {f"{name}_total": own for name, (_, own) in ray_metrics._COUNTERS.items()}
    tags |= {name: own for name, (_, own) in ray_metrics._GAUGES.items()}
    tags |= {f"staleness_versions_{part}": () for part in ("sum", "count")}
    tags["staleness_versions_bucket"] = ("le",)
    return {f"{PREFIX}{name}": {"run", *own} for name, own in tags.items()}


TAGS = exported()


def parsed(query):
    """Of a query as Grafana fills it in."""
    return promql.parse(query.replace("$run", ".*").replace("$__rate_interval", "1m"))


def below(expression, kind):
    found = []
    promql.walk(expression, lambda each: found.append(each) if isinstance(each, kind) else None)
    return found


def selectors(expression):
    return below(expression, VectorSelector)


def grouped_by(expression):
    """Labels by which each node groups or joins, and the metrics below it."""
    for each in below(expression, (AggregateExpr, BinaryExpr)):
        labels = _labels(each)
        if labels:
            yield labels, {selector.name for selector in selectors(each)}


def _labels(node):
    if isinstance(node, AggregateExpr):
        return set(node.modifier.labels) if node.modifier else set()
    matching = node.modifier.matching if node.modifier else None
    return set(matching.labels) if matching else set()


@pytest.mark.parametrize("query", ASKED)
def test_asks_for_series_and_tags_that_there_are(query):
    expression = parsed(query)
    assert selectors(expression)
    for selector in selectors(expression):
        assert selector.name in TAGS
        matched = set(re.findall(r"(\w+)(?:=~|!=|!~|=)\"", str(selector.matchers)))
        assert matched <= TAGS[selector.name]
    for labels, names in grouped_by(expression):
        for name in names:
            assert labels <= TAGS[name], name


@pytest.mark.parametrize("query", [query for _, query in panels()])
def test_panels_show_the_runs_that_are_chosen(query):
    for selector in selectors(promql.parse(query.replace("$__rate_interval", "1m"))):
        assert 'run=~"$run"' in str(selector.matchers)


UNSEEN = {"pushes_total", "push_queue_seconds_total", "version"}
"""What other panels show in another way."""


def test_there_is_a_panel_or_an_alert_for_every_other_metric():
    def whole(names):
        return {re.sub("_(bucket|sum|count)$", "", name) for name in names}

    shown = {selector.name for each in ASKED for selector in selectors(parsed(each.values[0]))}
    assert whole(TAGS) - whole(shown) == {PREFIX + name for name in UNSEEN}
