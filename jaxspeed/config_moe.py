# SPDX-License-Identifier: Apache-2.0
"""How tokens are handed to experts: the part of the run configuration that routers read. Layer 0: standard library only."""

from dataclasses import dataclass
from typing import Literal

from jaxspeed.checks import ConfigError, check_types, no_negatives


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Mixture of experts, in models that have some (model.num_experts): what is dropped, drawn and added to the loss."""

    capacity_factor: float = 0.0
    """Tokens that an expert takes of a row, in even shares (k T / E); those that come later pass it by. 0: it takes all (dropless). DeepSpeed: capacity_factor, drop_tokens."""
    eval_capacity_factor: float = 0.0
    """The same in evaluation and generation, where 0 is advisable: what is said of a row then hangs on that row alone."""
    min_capacity: int = 4
    """Least tokens that an expert takes of a row."""
    random_priority: bool = False
    """Who is dropped is drawn by lot, not those that come last. DeepSpeed: use_rts."""
    noise: Literal["none", "jitter", "gumbel"] = "none"
    """In training. jitter: what the router reads is multiplied by 1 +- 0.01. gumbel: experts are drawn with the router's probabilities. DeepSpeed: noisy_gate_policy Jitter, RSample."""
    sample_second: bool = False
    """In training, the second of two experts is drawn with the router's probabilities. DeepSpeed: top2_2nd_expert_sampling."""
    balance_coef: float = 0.01
    """Weight of the loss that evens out how much experts have to do (arXiv 2101.03961 eq. 4, of each row); it is 1 when all have the same."""
    z_coef: float = 0.0
    """Weight of the router z-loss (arXiv 2202.08906 eq. 5), which keeps its logits small; 1e-3 is usual."""

    def __post_init__(self) -> None:
        check_types(self, "moe")
        no_negatives(self, "moe")
        for name in ("min_capacity", "random_priority"):
            value = getattr(self, name)
            drops = self.capacity_factor or self.eval_capacity_factor
            if not drops and value != getattr(MoeConfig, name):
                raise ConfigError(
                    f"moe.{name}={value} has no effect while nothing is dropped; remove it, or give moe.capacity_factor"
                )
        if self.sample_second and self.noise == "gumbel":
            raise ConfigError(
                "moe.sample_second=True has no effect with moe.noise='gumbel', which draws both experts; remove one of them"
            )

    @property
    def draws(self) -> bool:
        """Whether training draws random numbers for its routers."""
        return self.random_priority or self.noise != "none" or self.sample_second

    @property
    def at_rest(self) -> "MoeConfig":
        """The same for evaluation and generation: nothing is drawn, nothing added to a loss."""
        return MoeConfig(
            capacity_factor=self.eval_capacity_factor,
            min_capacity=self.min_capacity
            if self.eval_capacity_factor
            else MoeConfig.min_capacity,
        )
