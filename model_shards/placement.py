"""Which shard holds which routed expert. Pure data: every rank derives the same tables from it."""

from dataclasses import dataclass

from model_shards.errors import ConfigError


@dataclass(frozen=True)
class ExpertPlacement:
    """`shards[ep_rank]` lists the logical experts that shard holds, in the order of its local ids.

    The same placement serves every MoE layer. Every logical expert stands on exactly one shard.
    """

    num_logical: int
    shards: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        held = sorted(expert for shard in self.shards for expert in shard)
        if held != list(range(self.num_logical)):
            raise ConfigError(
                f"a placement must hold each of {self.num_logical} logical experts exactly once, got {held}"
            )

    @property
    def num_shards(self) -> int:
        """N."""
        return len(self.shards)


def contiguous_placement(num_logical: int, num_shards: int) -> ExpertPlacement:
    """Cuts the experts into `num_shards` runs whose lengths differ by at most one.

    Experts of one gate group are neighbours, so groups stay whole whenever the number of shards divides
    the number of groups, and a token then visits at most `topk_group` shards (DeepSeek-V2, section 2.2.2).
    Raises ConfigError when there are more shards than experts.
    """
    if not 1 <= num_shards <= num_logical:
        raise ConfigError(f"the number of expert shards must be 1 to {num_logical} (the experts), got {num_shards}")
    base, extra = divmod(num_logical, num_shards)
    shards: list[tuple[int, ...]] = []
    start = 0
    for ep_rank in range(num_shards):
        stop = start + base + (1 if ep_rank < extra else 0)
        shards.append(tuple(range(start, stop)))
        start = stop
    return ExpertPlacement(num_logical, tuple(shards))
