"""The cluster token: one secret that all processes of a farm share. It opens /bootstrap, and /bootstrap alone tells where the queue is."""

import hmac
import ipaddress

ENV = "TOKENMILL_CLUSTER_TOKEN"
LEAST_CHARS = 16


def is_shown(authorization: str, token: str) -> bool:
    """Does this Authorization header carry the token? Takes as long for a wrong one as for the right one."""
    scheme, _, presented = authorization.partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(presented.strip().encode(), token.encode())


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
