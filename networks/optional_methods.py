"""Methods of the network-module contract that not every third-party network has."""

from __future__ import annotations


def call_if_there(network: object, method: str, *arguments: object) -> object:
    """What the method returns; None where it is missing."""
    function = getattr(network, method, None)
    return None if function is None else function(*arguments)
