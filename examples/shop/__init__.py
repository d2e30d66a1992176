"""A shop that many merchants share: each is a tenant, with orders of its own and a queue of its own."""
