"""A dict of plain values as a tensor, so that it can stand in a state dict beside the weights."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.checkpoint.planner import WriteItem


def pack_dict_to_tensor(source_dict: dict[str, Any]) -> Tensor:
    """The JSON text of ``source_dict`` in UTF-8, u8[bytes] on the CPU."""
    return torch.tensor(list(json.dumps(source_dict).encode("utf-8")), dtype=torch.uint8, device="cpu")


class PackedValues(Tensor):
    """What :func:`pack_dict_to_tensor` gives, as a state dict holds it.

    Its length depends on the digits of its numbers, and torch.distributed.checkpoint loads a tensor only into one of
    its size: there it is stored as an object. Everything else stores the plain tensor.
    """

    def __create_write_items__(self, fqn: str, packed: Tensor) -> list[WriteItem]:
        from torch.distributed.checkpoint.metadata import MetadataIndex
        from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

        return [WriteItem(index=MetadataIndex(fqn), type=WriteItemType.BYTE_IO)]

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedValues:
        return memo.setdefault(id(self), self.clone())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


def unpack_tensor_to_dict(tensor_data: Tensor) -> dict[str, Any]:
    """Undo :func:`pack_dict_to_tensor`.

    Raises:
        ValueError: not a u8 tensor that holds a JSON object.
    """
    if tensor_data.dtype != torch.uint8:
        raise ValueError(f"tensor_data: expected uint8 bytes of JSON, got {tensor_data.dtype}")
    try:
        content = json.loads(bytes(tensor_data.cpu().flatten().tolist()).decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"tensor_data: does not hold JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"tensor_data: expected a JSON object, got {type(content).__name__}")
    return content
