"""A dict of plain values as a tensor, so that it can stand in a state dict beside the weights."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bnb_core.checks import check_dense, shown

if TYPE_CHECKING:
    from torch.distributed.checkpoint.planner import WriteItem


def pack_dict_to_tensor(source_dict: dict[str, Any]) -> Tensor:
    """The JSON text of ``source_dict`` in UTF-8, u8[bytes] on the CPU.

    Raises:
        TypeError, ValueError: not a dict, or one of what JSON does not have.
    """
    if not isinstance(source_dict, dict):
        raise TypeError(f"source_dict: expected a dict, got {shown(source_dict)}")
    try:
        text = json.dumps(source_dict)
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"source_dict: cannot be written as JSON: {error}") from error
    return torch.tensor(list(text.encode("utf-8")), dtype=torch.uint8, device="cpu")


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
        TypeError, ValueError: not a u8 tensor that holds a JSON object.
    """
    check_dense("tensor_data", tensor_data)
    if tensor_data.dtype != torch.uint8:
        raise ValueError(f"tensor_data: expected uint8 bytes of JSON, got {tensor_data.dtype}")
    if tensor_data.is_meta:
        raise ValueError("tensor_data: expected bytes of JSON, got a tensor on meta, which has none")
    try:
        content = json.loads(bytes(tensor_data.cpu().flatten().tolist()).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"tensor_data: does not hold JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"tensor_data: expected a JSON object, got {type(content).__name__}")
    return content
