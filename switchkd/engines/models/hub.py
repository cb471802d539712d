"""Finds out in seconds whether the model hub can be reached, before its libraries try each file for half a minute.

In: HF_ENDPOINT and the proxies of the environment. Out: nothing where a connection is accepted; a hub that then answers
slowly is waited for. Where it is refused, the libraries of this process and its children read their caches only.
"""

from __future__ import annotations

import os
import socket
from functools import cache
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from switchkd.config.errors import first_line

CONNECT_S = 5.0


@cache
def unreachable() -> str:
    """Return why no connection to the hub is accepted, empty where one is or where the user chose HF_HUB_OFFLINE.
    Otherwise set that, for libraries that are loaded and for those that will be."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return ""
    url = urlsplit(constants.ENDPOINT)
    proxies = getproxies()
    proxy = None if proxy_bypass(url.netloc) else proxies.get(url.scheme) or proxies.get("all")
    address = urlsplit(proxy if "://" in proxy else f"http://{proxy}") if proxy else url
    port = address.port or (443 if address.scheme == "https" else 80)
    try:  # the network
        socket.create_connection((address.hostname or "", port), timeout=CONNECT_S).close()
    except OSError as error:
        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = True
        via = f" through the proxy {address.hostname}:{port}" if proxy else ""
        return f"{constants.ENDPOINT} cannot be reached{via} ({error.strerror or first_line(error)})"
    return ""


def reason(error: Exception) -> str:
    """Return why the hub gave nothing: that it is not reached, where its libraries only looked into their caches."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    cached_only = isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled | ConnectionError)
    return (cached_only and unreachable()) or first_line(error)[:200]
