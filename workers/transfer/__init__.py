"""Ways to bring KV pages of a prefill worker into a decode worker's pool: mapped memory on one host, collectives between any two."""
