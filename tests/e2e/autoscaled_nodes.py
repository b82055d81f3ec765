"""What Ray's autoscaler makes nodes with, for `autoscaling.py`."""

from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class Provider(FakeMultiNodeProvider):
    """Raylets on this machine, which offer the memory that Ray finds."""

    def _create_node_with_resources_and_labels(
        self,
        node_config: dict[str, Any],
        tags: dict[str, str],
        count: int,
        resources: dict[str, float],
        labels: dict[str, str],
    ) -> None:
        # Memory would be taken for a resource of our own, and refused.
        rest = {name: value for name, value in resources.items() if name != "memory"}
        super()._create_node_with_resources_and_labels(node_config, tags, count, rest, labels)
