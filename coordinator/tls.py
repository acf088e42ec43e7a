"""The CA that this process trusts for doors, NATS (tls://) and Redis (rediss://): TOKENMILL_TLS_CA, which `serve` sets from --tls_ca.

Without one, tls:// and rediss:// trust the CAs of the system.
"""

import os
import ssl
from typing import Any

ENV = "TOKENMILL_TLS_CA"


def context_for(url: str) -> ssl.SSLContext | None:
    """For NATS; None where the URL does not ask for TLS."""
    if not any(part.strip().startswith("tls://") for part in url.split(",")):
        return None
    return ssl.create_default_context(cafile=os.environ.get(ENV) or None)


def redis_options(url: str) -> dict[str, Any]:
    """For redis-py's from_url."""
    ca = os.environ.get(ENV)
    return {"ssl_ca_certs": ca} if ca and url.startswith("rediss://") else {}
