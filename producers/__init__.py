"""The ways in: NATS client, REST shim, batch pipelines. Never imports torch."""
