"""Ranks of a cell: M attention ranks, then N expert ranks, in one line.

global_rank      0 ........ M-1   M ........ M+N-1
role             A0 ..... A(M-1)  E0 ..... E(N-1)
attention_rank   0 ........ M-1
ep_rank                           0 ........ N-1
"""

from dataclasses import dataclass
from enum import Enum

from model_shards.errors import ConfigError


class Role(Enum):
    """What a rank does."""

    ATTENTION = "attention"
    EXPERT = "expert"


@dataclass(frozen=True)
class Topology:
    """M attention ranks and N expert ranks; any M >= 1 and N >= 1 work."""

    num_attention: int
    num_expert: int

    def __post_init__(self) -> None:
        if self.num_attention < 1 or self.num_expert < 1:
            raise ConfigError(
                "a cell needs at least 1 attention rank and 1 expert rank, "
                f"got {self.num_attention} and {self.num_expert}"
            )

    @property
    def world_size(self) -> int:
        """M + N."""
        return self.num_attention + self.num_expert

    def role(self, global_rank: int) -> Role:
        """Role of a global rank."""
        return Role.ATTENTION if global_rank < self.num_attention else Role.EXPERT

    def attention_global_rank(self, attention_rank: int) -> int:
        """Global rank of A(attention_rank)."""
        return attention_rank

    def expert_global_rank(self, ep_rank: int) -> int:
        """Global rank of E(ep_rank)."""
        return self.num_attention + ep_rank

    def name(self, global_rank: int) -> str:
        """`A0`, `E3`: how logs and errors name a rank."""
        if self.role(global_rank) is Role.ATTENTION:
            return f"A{global_rank}"
        return f"E{global_rank - self.num_attention}"
