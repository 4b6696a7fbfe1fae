"""A model that logs its batches, in a module that workers import quickly."""

import os
import time
from dataclasses import dataclass
from types import SimpleNamespace

from sktl._inference.model_spec import ModelSpec


@dataclass(frozen=True)
class Logged(ModelSpec):
    """Log each batch with its process, and delay it."""

    log: str = ""
    seconds: float = 0.0

    def compile(self):
        """Return the compiled model, whose batches are logged."""
        made = super().compile()

        def start(pixels):
            with open(self.log, "a") as log:
                print(os.getpid(), len(pixels), file=log)
            time.sleep(self.seconds)
            return made.start(pixels)

        return SimpleNamespace(start=start, execution=made.execution, n_ahead=0)
