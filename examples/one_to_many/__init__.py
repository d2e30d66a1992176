"""From one customer to many: plain and durable tasks, `public` and new tenants, and the move, all in one run."""
