# SPDX-License-Identifier: Apache-2.0
"""How text is written: the settings of `jaxspeed generate` and of `jaxspeed.generate.Writer`.

What they do is in `jaxspeed.choice`. Layer 0: standard library only, so that `--help` is quick.
"""

import math
from dataclasses import dataclass

from jaxspeed.config import config_error


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How text is written."""

    max_new_tokens: int = 128
    """Tokens to write, at most."""
    min_new_tokens: int = 0
    """Tokens before the text may end."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token (greedy)."""
    top_k: int = 0
    """Draw from so many likeliest tokens; 0: from all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this probability (arXiv 1904.09751)."""
    min_p: float = 0.0
    """Draw from tokens at least this share as likely as the likeliest (arXiv 2407.01082)."""
    repetition_penalty: float = 1.0
    """Above 1: logits of tokens that occurred are divided by it, negative ones multiplied (arXiv 1909.05858)."""
    num_samples: int = 1
    """Texts written for each prompt."""
    stop: tuple[str, ...] = ()
    """Strings at which a text ends; they are not part of it."""
    seed: int = 0
    """Of the draws. A row's draws depend on its number and this only, not on what else is in the batch."""

    def __post_init__(self) -> None:
        """Checks the ranges."""
        ranges = {
            "max_new_tokens": (1, math.inf),
            "min_new_tokens": (0, self.max_new_tokens),
            "temperature": (0, math.inf),
            "top_k": (0, math.inf),
            "top_p": (1e-6, 1),
            "min_p": (0, 1),
            "repetition_penalty": (1e-6, math.inf),
            "num_samples": (1, math.inf),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not low <= value <= high or math.isinf(value):
                why = "out of range" if math.isfinite(value) else "not a number"
                change = f"give {low:g} or more" + (
                    "" if math.isinf(high) else f", at most {high:g}"
                )
                raise config_error(name, value, why, change)
        if any(not text for text in self.stop):
            raise config_error(
                "stop", self.stop, "an empty string ends every text", "leave it out"
            )
        idle = SamplingConfig
        if self.temperature == 0 and (self.top_k, self.top_p, self.min_p) != (
            idle.top_k,
            idle.top_p,
            idle.min_p,
        ):
            raise config_error(
                "temperature",
                self.temperature,
                "top_k, top_p and min_p have no effect on greedy text",
                "leave them out, or give a temperature above 0",
            )
