"""Control plane and contracts: what travels between processes, and who owns what. Never imports torch."""
