"""Run plain tasks, `public` and two new tenants on one worker, move `public` to a tenant, and check every total.

Uses the servers that CLOACINA_DATABASE_URL and CLOACINA_BROKER_URL name, which nothing else should use, else
embedded ones, which it stops at the end if it started them. Exits with 0 only if every total is right.
"""

from __future__ import annotations

import sys

from cloacina_celery import CloacinaError
from examples.servers import servers


def main() -> int:
    """Play the story on servers that answer, and return the exit code."""
    try:
        with servers():
            # Only now, as it asks the environment for its servers.
            from examples.one_to_many.story import StoryFailed, play

            try:
                return 0 if play() else 1
            except StoryFailed as error:
                print(f"the example failed: {error}", file=sys.stderr)
                return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CloacinaError as error:
        sys.exit(f"error: {error}")
