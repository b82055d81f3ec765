"""Notices that a node will soon be gone."""

from collections.abc import Collection

import ray._private.state as ray_state


def draining_nodes() -> Collection[str]:
    """Ids of the nodes that Ray was told will soon be gone, and places nothing new on.

    Ray has no public call for it; its own Train and Serve ask here as well. A Ray that can't be
    asked has no notices.
    """
    ask = getattr(ray_state.state, "get_draining_nodes", None)
    nodes: Collection[str] = ask() if ask is not None else ()
    return nodes
