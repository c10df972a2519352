"""How many bytes of tensors live at once, and how many operations make them, counted while they come and go."""

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sana.training.flops import flop_of


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts storages that are made inside a `with` block, on any device, also of tensors without values, and products.

    What is `known` at the start counts as held by others, and so do views of it.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        """Nothing is counted yet."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.peak, self.flop = 0, 0, 0
        self._others = {_key(tensor) for tensor in known}
        self._held: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation, and count what it made."""
        out = func(*args, **(kwargs or {}))
        self.flop += flop_of(func, args, kwargs or {}, out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key in self._others or key in self._held:
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            del self._held[key]
            self.now -= size

        self._held[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def _key(tensor: Tensor) -> int:
    # The address of the storage itself: that of its bytes is 0 where there are none.
    return int(tensor.untyped_storage()._cdata)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, one by one."""
    return sum(tensor.nbytes for tensor in tensors)
