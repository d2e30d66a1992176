"""336,776 flights of 16 carriers, each carrier a tenant, loaded while a worker is killed: `make demo`."""
