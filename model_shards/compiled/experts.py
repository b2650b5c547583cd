"""The routed experts of one shard as compiled programs: one call sorts the pairs, one does all the rest of a layer.

    sort    counts, places                                          how many pairs there are decides how much room
    rest    gather -> gate and up -> SwiGLU -> down -> weighted sum

Shapes: R rows received, K expert slots per row, H hidden size, I moe_intermediate_size, E experts held here, P pairs.
What is computed, and in which order it is summed, is `model_shards.experts`'.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from model_shards.kernels import pairs, rows
from model_shards.kernels.arena import Arena, Array
from model_shards.kernels.builder import LANES
from model_shards.kernels.grouped_product import Rows
from model_shards.kernels.program import Call, Program
from model_shards.packing import Packed, PackedInt8, product_call


@dataclass(frozen=True)
class LayerMatrices:
    """One layer's, laid out; both plain or both of 8 bits."""

    gate_up: Packed  # [E, 2I, H]
    down: Packed  # [E, H, I]


class CompiledExperts:
    """All layers of a shard. For one thread."""

    def __init__(self, experts: int, hidden: int, width: int, layers: Sequence[LayerMatrices]) -> None:
        """E, H and I: the last two are served when `serves` says so."""
        self._hidden, self._width = hidden, width
        self._layers = layers
        self._quantized = isinstance(layers[0].gate_up, PackedInt8)
        operand = torch.uint8 if self._quantized else torch.bfloat16
        self._counts = torch.zeros(2, experts, dtype=torch.int64)  # of each expert's rows, and where they end
        self._numbers = (ctypes.c_int64 * 3)()  # R, R * K, P
        self._slots = Arena({"places": Array(torch.int64, 1)})
        self._pairs = Arena(
            {
                "rows": Array(operand, hidden),
                "row_scales": Array(torch.float32, 1),
                "gate_up": Array(torch.float32, layers[0].gate_up.padded_outputs),
                "active": Array(operand, width),
                "active_scales": Array(torch.float32, 1),
                "outputs": Array(torch.float32, layers[0].down.padded_outputs),
            }
        )
        self._sort = Call(
            pairs.sort_pairs(),
            pairs.SORT_ARGUMENTS,
            slots=self._number(1),
            local_ids=0,
            experts=experts,
            counts=self._counts[0].data_ptr(),
            ends=self._counts[1].data_ptr(),
            places=0,
            pairs=self._number(2),
        )
        self._gather = Call(
            pairs.gather_rows(self._quantized),
            pairs.GATHER_ARGUMENTS,
            rows=self._number(0),
            hidden=0,
            places=0,
            out=0,
            scales=0,
            size=hidden,
            top_k=0,
        )
        self._sum = Call(
            pairs.sum_pairs(),
            pairs.SUM_ARGUMENTS,
            rows=self._number(0),
            outputs=0,
            outputs_row=0,
            places=0,
            weights=0,
            out=0,
            size=hidden,
            top_k=0,
        )
        self._programs: list[Program] = []

    def forward(self, index: int, hidden: torch.Tensor, local_ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """See `model_shards.experts.ExpertShardModel.forward`; `index` is the layer's among those given."""
        num_rows, top_k = local_ids.shape
        assert hidden.dtype is torch.bfloat16, "as the weights are, or were before they were quantized"
        assert weights.dtype is torch.float32, "as the gate gives them"
        assert hidden.shape == (num_rows, self._hidden), "rows are of the model's size"
        assert weights.shape == local_ids.shape, "a weight for each slot"
        hidden, weights = hidden.contiguous(), weights.contiguous()
        local_ids = local_ids.to(torch.int32).contiguous()
        out = torch.empty_like(hidden)
        self._slots.make_room(num_rows * top_k)
        places = self._slots.address("places")
        self._numbers[0], self._numbers[1] = num_rows, num_rows * top_k
        self._sort.set(local_ids=local_ids.data_ptr(), places=places)
        self._sort.run(1)
        if self._numbers[2] < 0:
            raise IndexError(f"a row names an expert beyond the {len(self._counts[0])} of this shard")
        if not self._has_room(self._numbers[2]):
            self._programs = []
            self._pairs.make_room(self._numbers[2])
            self._build()
        self._gather.set(hidden=hidden.data_ptr(), places=places, top_k=top_k)
        self._sum.set(weights=weights.data_ptr(), out=out.data_ptr(), places=places, top_k=top_k)
        self._programs[index].run(torch.get_num_threads())
        return out

    def _has_room(self, pairs: int) -> bool:
        return bool(self._programs) and pairs <= self._pairs.capacity

    def _build(self) -> None:
        """Anew, for where the arena is now."""
        outputs = self._pairs["outputs"]
        self._gather.set(out=self._pairs.address("rows"), scales=self._pairs.address("row_scales"))
        self._sum.set(outputs=outputs.data_ptr(), outputs_row=outputs.stride(0) * 4)
        active = Call(
            rows.swiglu(self._quantized),
            rows.SWIGLU_ARGUMENTS,
            rows=self._number(2),
            x=self._pairs.address("gate_up"),
            x_row=self._pairs["gate_up"].stride(0) * 4,
            out=self._pairs.address("active"),
            scales=self._pairs.address("active_scales"),
            size=self._width,
        )
        self._programs = [
            Program(
                [
                    self._gather,
                    self._product(layer.gate_up, "rows", "row_scales", "gate_up"),
                    active,
                    self._product(layer.down, "active", "active_scales", "outputs"),
                    self._sum,
                ]
            )
            for layer in self._layers
        ]

    def _product(self, matrices: Packed, x: str, scales: str, out: str) -> Call:
        rows_in, rows_out = Rows.of(self._pairs[x]), Rows.of(self._pairs[out])
        return product_call(matrices, rows_in, self._pairs[scales], rows_out, self._counts[0].data_ptr())

    def _number(self, index: int) -> int:
        return ctypes.addressof(self._numbers) + 8 * index


def serves(hidden: int, width: int) -> bool:
    """Whether there is compiled code for such sizes."""
    return hidden % LANES == 0 and width % LANES == 0
