# SPDX-License-Identifier: Apache-2.0
"""What a model keeps between the tokens that it writes: keys and values, recurrent states.

While a model writes, `ambient(cache=...)` is in force and the ops that remember (causal attention,
`remember`, a recurrence) take what they kept at the pass before and leave what the next one needs.
They do so in the order in which the model calls them, which is the same at each pass; so model
files know nothing of it, and a model that trains can generate. A Cache lives for one trace; what
it holds goes in and out of compiled functions as plain arrays. Layer 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Array, Bool, Int


@dataclass
class Cache:
    """One pass of a model over some tokens, as the ops that remember see it."""

    size: int
    """Slots for tokens (S)."""
    visible: Bool[Array, "B S"]
    """Slots that hold a token, those of this pass included; not padding."""
    start: Int[Array, ""] | None = None
    """The slot of this pass's first token; None: the first pass, which makes what is kept."""
    before: Sequence[Any] | None = None
    """What the pass before kept, in order."""
    kept: list[Any] = field(default_factory=list)
    """What this pass keeps, in order."""

    def take(self) -> Any:
        """Returns what the caller kept at the pass before, or None at the first; `keep` must follow."""
        return None if self.before is None else self.before[len(self.kept)]

    def keep(self, entry: Any) -> None:
        """Keeps arrays (any pytree) for the caller's `take` at the next pass."""
        self.kept.append(entry)

    def inner(self, before: Sequence[Any] | None) -> "Cache":
        """Returns the cache of a part of the model that is called once, a layer for instance."""
        return Cache(self.size, self.visible, self.start, before)
