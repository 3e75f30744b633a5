"""Metrics of the chat service, for Prometheus."""

from itertools import chain
from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric

LATENCIES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Metrics:
    """Metrics of one ChatService. Its name is the label `front`."""

    def __init__(self, front: str):
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "nanochat_requests", "Requests answered", ["front", "route", "status"], registry=registry
        )
        latencies: dict = {"labelnames": ["front"], "registry": registry, "buckets": LATENCIES}
        self.ttft = Histogram("nanochat_ttft_seconds", "Time to first token", **latencies).labels(front)
        self.itl = Histogram("nanochat_inter_token_seconds", "Between tokens", **latencies).labels(front)

    @staticmethod
    def text(fronts: list[list[Metric]], engines: dict[str, list[dict[str, float]]]) -> bytes:
        """Return the metrics of all ChatServices and of each model's engines, in Prometheus' format."""
        registry, gauges = CollectorRegistry(), {}
        for model, replicas in engines.items():
            for replica, stats in enumerate(replicas):
                for key, value in stats.items():
                    if key not in gauges:
                        name, labels = f"nanochat_engine_{key}", ["model", "replica"]
                        gauges[key] = Gauge(name, f"{key} of an engine", labels, registry=registry)
                    gauges[key].labels(model, replica).set(value)
        families = {}
        for family in chain(*fronts):
            families.setdefault(family.name, Metric(family.name, family.documentation, family.type)).samples.extend(
                family.samples
            )
        collector: Any = SimpleNamespace(collect=families.values)
        return generate_latest(collector) + generate_latest(registry)
