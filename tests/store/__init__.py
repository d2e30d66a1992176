"""Each verb of the protocol on a real Postgres: what it writes, what it refuses, and who wins a race."""
