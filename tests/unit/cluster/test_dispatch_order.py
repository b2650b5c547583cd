"""The expert side's order of exchanges is the one that the attention side's pipeline really produces."""

import itertools

import pytest
import torch

from cluster.dispatch.order import Direction, Exchange, exchange_order
from cluster.dispatch.transport import BufferPool
from model_shards.pipeline import run_micro_batches


def recorded_order(layers: tuple[int, ...], micro_batches: tuple[int, ...]) -> tuple[Exchange, ...]:
    """Runs forward passes that do nothing but exchange, as `AttentionModel.forward_steps` does it."""
    order: list[Exchange] = []

    def forward(micro_batch: int):
        for layer in layers:
            order.append(Exchange(Direction.DISPATCH, layer, micro_batch))
            yield
            order.append(Exchange(Direction.COMBINE, layer, micro_batch))
        return torch.zeros(0)

    run_micro_batches([forward(index) for index in micro_batches])
    return tuple(order)


@pytest.mark.parametrize("micro_batches", [(0,), (0, 1), (0, 1, 2), (1,), (0, 2)])
@pytest.mark.parametrize("layers", [(1,), (1, 2), (0, 2, 4, 6)])
def test_the_expert_side_posts_in_the_order_of_the_attention_side(layers, micro_batches):
    assert exchange_order(layers, micro_batches) == recorded_order(layers, micro_batches)


def test_no_order_without_layers_or_micro_batches():
    assert exchange_order((), (0, 1)) == ()
    assert exchange_order((1, 2), ()) == ()


def test_a_micro_batch_has_at_most_one_exchange_of_each_direction_under_way():
    for order in (exchange_order((1, 2, 3), tuple(range(count))) for count in (1, 2, 3)):
        for micro_batch in range(3):
            own = [exchange.direction for exchange in order if exchange.micro_batch == micro_batch]
            assert all(a is not b for a, b in itertools.pairwise(own))


def test_a_buffer_is_kept_while_it_is_long_enough():
    pool = BufferPool(torch.device("cpu"))
    first = pool.take("a", 100)
    assert pool.take("a", 128).data_ptr() == first.data_ptr()
    assert pool.take("b", 100).data_ptr() != first.data_ptr()
    assert pool.take("a", 129).shape == (129,)
    assert pool.take("a", 256).data_ptr() == pool.take("a", 1).data_ptr()
