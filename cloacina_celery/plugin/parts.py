"""The plugin's parts, wired together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from cloacina_celery.plugin.kernel import Kernel
from cloacina_celery.plugin.limits import Limiter
from cloacina_celery.plugin.outbox import Outbox
from cloacina_celery.plugin.publisher import Publisher
from cloacina_celery.plugin.recovery import Recovery
from cloacina_celery.plugin.results import Backends
from cloacina_celery.plugin.settler import Settler
from cloacina_celery.plugin.submitter import Submitter


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Who does what: each part knows those before it."""

    kernel: Kernel
    publisher: Publisher
    limiter: Limiter
    submitter: Submitter
    outbox: Outbox
    backends: Backends
    settler: Settler
    recovery: Recovery

    @classmethod
    def make(cls, overrides: dict[str, Any]) -> Self:
        """Make the parts of one plugin."""
        kernel = Kernel(overrides)
        publisher, backends = Publisher(kernel), Backends(kernel)
        limiter = Limiter(kernel, publisher)
        settler = Settler(kernel, limiter)
        outbox = Outbox(kernel, publisher)
        recovery = Recovery(kernel, publisher, outbox, settler, backends)
        backends.on_revoked = recovery.revoked
        settler.recover_attempt = recovery.recover_attempt
        return cls(
            kernel=kernel,
            publisher=publisher,
            limiter=limiter,
            submitter=Submitter(kernel, publisher),
            outbox=outbox,
            backends=backends,
            settler=settler,
            recovery=recovery,
        )
