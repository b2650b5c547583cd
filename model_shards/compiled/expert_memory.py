"""What the pairs of an expert shard are computed in, and the calls that do it (model_shards.compiled.experts).

Shapes: R rows received, K expert slots per row, H hidden size, I moe_intermediate_size, E experts held here, P pairs.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from model_shards.kernels import pairs, rows
from model_shards.kernels.arena import Arena, Array
from model_shards.kernels.grouped_product import Rows
from model_shards.kernels.program import Call, Halt
from model_shards.packing import Packed, PackedInt8, product_call


@dataclass(frozen=True)
class LayerMatrices:
    """One layer's, laid out; both plain or both of 8 bits."""

    gate_up: Packed  # [E, 2I, H]
    down: Packed  # [E, H, I]


class ExpertMemory:
    """For one layer at a time."""

    def __init__(self, experts: int, hidden: int, width: int, layers: Sequence[LayerMatrices]) -> None:
        """E, H and I."""
        self.experts, self.hidden = experts, hidden
        self._width = width
        self._layers = layers
        self.quantized = isinstance(layers[0].gate_up, PackedInt8)
        operand = torch.uint8 if self.quantized else torch.bfloat16
        self.counts = torch.zeros(2, experts, dtype=torch.int64)  # of each expert's rows, and where they end
        self.pairs = ctypes.c_int64(0)  # P
        self._of_slots = Arena({"places": Array(torch.int64, 1)})
        self._of_pairs = Arena(
            {
                "rows": Array(operand, hidden),
                "row_scales": Array(torch.float32, 1),
                "gate_up": Array(torch.float32, layers[0].gate_up.padded_outputs),
                "active": Array(operand, width),
                "active_scales": Array(torch.float32, 1),
                "outputs": Array(torch.float32, layers[0].down.padded_outputs),
            }
        )
        self.moves = 0  # how often it has moved: calls of before have addresses of before
        self._products: list[list[Call]] = []

    def make_room(self, num_slots: int, num_pairs: int) -> None:
        """For so many slots and pairs. Raises what torch raises without memory for it; then there is room for none."""
        try:
            moved = self._of_slots.make_room(num_slots)
            if self._of_pairs.make_room(num_pairs):
                moved = True
        except BaseException:
            self._moved()
            raise
        if moved:
            self._moved()

    def products(self, index: int) -> list[Call]:
        """gate and up -> SwiGLU -> down of one layer's pairs; the layer's index is among those given."""
        if not self._products:
            active = Call(
                rows.swiglu(self.quantized),
                rows.SWIGLU_ARGUMENTS,
                rows=ctypes.addressof(self.pairs),
                x=self.address("gate_up"),
                x_row=self._of_pairs["gate_up"].stride(0) * 4,
                out=self.address("active"),
                scales=self.address("active_scales"),
                size=self._width,
            )
            self._products = [
                [
                    self._product(layer.gate_up, "rows", "row_scales", "gate_up"),
                    active,
                    self._product(layer.down, "active", "active_scales", "outputs"),
                ]
                for layer in self._layers
            ]
        return self._products[index]

    def address(self, name: str) -> int:
        """Of an array of the pairs."""
        return self._of_pairs.address(name)

    @property
    def places(self) -> int:
        """Address of where the pair of each slot is."""
        return self._of_slots.address("places")

    @property
    def outputs_row(self) -> int:
        """Bytes from one pair's output to the next one's."""
        return self._of_pairs["outputs"].stride(0) * 4

    def _moved(self) -> None:
        self.moves += 1
        self._products = []

    def _product(self, matrices: Packed, x: str, scales: str, out: str) -> Call:
        rows_in, rows_out = Rows.of(self._of_pairs[x]), Rows.of(self._of_pairs[out])
        return product_call(matrices, rows_in, self._of_pairs[scales], rows_out, self.counts[0].data_ptr())


class RowCalls:
    """From rows to pairs and back, where both lie now."""

    def __init__(
        self,
        memory: ExpertMemory,
        hidden: torch.Tensor,  # [R, H] bfloat16
        local_ids: torch.Tensor,  # [R, K] int32
        weights: torch.Tensor,  # [R, K] float32
        out: torch.Tensor,  # [R, H] bfloat16
        halt: Halt,
    ) -> None:
        """An id beyond the shard's halts a program by `halt`."""
        num_rows, top_k = local_ids.shape
        assert hidden.dtype is out.dtype is torch.bfloat16, "as the weights are, or were before they were quantized"
        assert local_ids.dtype is torch.int32, "as they are sent"
        assert weights.dtype is torch.float32, "as the gate gives them"
        assert hidden.shape == out.shape == (num_rows, memory.hidden), "rows are of the model's size"
        assert weights.shape == local_ids.shape, "a weight for each slot"
        assert all(part.is_contiguous() for part in (hidden, local_ids, weights, out)), "rows lie one after another"
        self._kept = (hidden, local_ids, weights, out)  # the calls have their addresses only
        self._numbers = (ctypes.c_int64 * 2)(num_rows, num_rows * top_k)
        number = ctypes.addressof(self._numbers)
        self.sort = Call(
            pairs.sort_pairs(),
            pairs.SORT_ARGUMENTS,
            slots=number + 8,
            local_ids=local_ids.data_ptr(),
            experts=memory.experts,
            counts=memory.counts[0].data_ptr(),
            ends=memory.counts[1].data_ptr(),
            places=memory.places,
            pairs=ctypes.addressof(memory.pairs),
            halt=halt.address,
        )
        self.gather = Call(
            pairs.gather_rows(memory.quantized),
            pairs.GATHER_ARGUMENTS,
            rows=number,
            hidden=hidden.data_ptr(),
            places=memory.places,
            out=memory.address("rows"),
            scales=memory.address("row_scales"),
            size=memory.hidden,
            top_k=top_k,
        )
        self.sum = Call(
            pairs.sum_pairs(),
            pairs.SUM_ARGUMENTS,
            rows=number,
            outputs=memory.address("outputs"),
            outputs_row=memory.outputs_row,
            places=memory.places,
            weights=weights.data_ptr(),
            out=out.data_ptr(),
            size=memory.hidden,
            top_k=top_k,
        )
