"""Notices that a node will soon be gone, and what room others have then."""

from collections.abc import Collection, Mapping

import ray
import ray._private.state as ray_state


def draining_nodes() -> Collection[str]:
    """Ids of the nodes that Ray was told will soon be gone, and places nothing new on.

    Ray has no public call for it; its own Train and Serve ask here as well. A Ray that can't be
    asked has no notices.
    """
    ask = getattr(ray_state.state, "get_draining_nodes", None)
    nodes: Collection[str] = ask() if ask is not None else ()
    return nodes


def free_resources() -> Mapping[str, Mapping[str, float]]:
    """By node, what nobody holds, as of about now.

    Ray has no public call for it either; one that can't be asked says what nodes have.
    """
    ask = getattr(ray_state, "available_resources_per_node", None)
    if ask is None:
        return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    free: Mapping[str, Mapping[str, float]] = ask()
    return free
