"""Load a year of flights for 16 tenants through real workers, kill one of them, and check every total.

Uses the servers that CLOACINA_DATABASE_URL and CLOACINA_BROKER_URL name, else embedded ones, which it stops
at the end if it started them. Exits with 0 only if all totals equal the file's and something was recovered.
"""

from __future__ import annotations

import os
import sys

from cloacina_celery import CloacinaError
from examples.servers import servers


def main() -> int:
    """Run the demo on servers that answer, and return the exit code."""
    os.environ["CLOACINA_IMPORTS"] = "examples.flights.tasks"
    try:
        with servers():
            # Only now, as it asks the environment for its servers.
            from examples.flights.demo import DemoFailed, run

            try:
                return 0 if run() else 1
            except DemoFailed as error:
                print(f"the demo failed: {error}", file=sys.stderr)
                return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CloacinaError as error:
        sys.exit(f"error: {error}")
