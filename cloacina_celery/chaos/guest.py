"""A user's own app as a verification's workers and beats load it.

CHAOS_APP names it as ``-A`` does; CHAOS_SETTINGS and CHAOS_TENANTS (JSON) are what `adopt` is given.
"""

from __future__ import annotations

import json
import os

from celery.app.utils import find_app

from cloacina_celery.chaos.adopt import adopt

app = adopt(
    find_app(os.environ["CHAOS_APP"]),
    json.loads(os.environ["CHAOS_SETTINGS"]),
    json.loads(os.environ["CHAOS_TENANTS"]),
)
