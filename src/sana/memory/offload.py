"""Weights that come when a module is used and go when it is not: whole modules, or one block at a time.

Applied from outside: parameter names and the modules' own code stay as they are, and so does every bit of the result.
"""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor, nn

BLOCKS = ("transformer_blocks", "layers", "model.layers")
"""Where the modules that are streamed keep their equal blocks."""
EMBEDDINGS = ("embed_tokens", "model.embed_tokens")
"""Tables of which a text needs few rows."""


class Source(Protocol):
    """Where the weights are while they are away."""

    def names(self) -> frozenset[str]:
        """Return the names of the tensors that can be read."""

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return tensors, in main memory."""

    def rows(self, name: str, indices: Iterable[int]) -> Tensor:
        """Return rows of a tensor."""

    def rest(self, name: str, tensor: Tensor) -> Tensor:
        """Return what stands in a module for a tensor that is away."""


class HostTensors:
    """Weights that stay in main memory while the module computes elsewhere."""

    def __init__(self, module: nn.Module) -> None:
        self._tensors: dict[str, Tensor] = {name: tensor.detach() for name, tensor in module.state_dict().items()}

    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self._tensors[name] for name in names}

    def rows(self, name: str, indices: Iterable[int]) -> Tensor:
        return self._tensors[name][torch.tensor(list(indices))]

    def rest(self, name: str, tensor: Tensor) -> Tensor:
        return self._tensors[name]


class Shelf:
    """The weights of one module, brought to a device and taken off again.

    A weight that was changed or replaced while it was there (by fused adapters, say) is never let go.
    """

    def __init__(self, module: nn.Module, source: Source, device: torch.device) -> None:
        self._module = weakref.ref(module)
        self.source, self.device = source, device
        held = module.state_dict()
        self.names = tuple(name for name in held if name in source.names())
        self._dtypes = {name: held[name].dtype for name in self.names}
        self._here: dict[str, tuple[int, int, int]] = {}
        for name in self.names:
            if not held[name].is_meta:
                self._here[name] = _mark(self._get(name))

    @property
    def module(self) -> nn.Module:
        """The module; it lives as long as its owner keeps it."""
        found = self._module()
        assert found is not None
        return found

    def keep(self, names: Iterable[str]) -> None:
        """Never let go of these."""
        lost = frozenset(names)
        self.names = tuple(name for name in self.names if name not in lost)
        for name in lost:
            self._here.pop(name, None)

    def bring(self, names: Iterable[str] | None = None) -> None:
        """Have all weights, or those of these names that are the shelf's, on the device."""
        wanted = self.names if names is None else frozenset(self.names).intersection(names)
        self.put(self.source.read([name for name in wanted if name not in self._here]))
        if names is None:
            self._follow()

    def put(self, tensors: dict[str, Tensor]) -> None:
        """Set weights that were read, those that are away."""
        for name, tensor in tensors.items():
            if name in self._dtypes and name not in self._here:
                # `.data`, because tensors in one piece of memory count their changes together otherwise.
                self._set(name, tensor.to(self.device, self._dtypes[name]).data)
                self._here[name] = _mark(self._get(name))

    def release(self, names: Iterable[str] | None = None) -> None:
        """Let go of all weights, or of those of these names, except changed ones."""
        changed: list[str] = []
        for name in tuple(self._here) if names is None else names:
            mark = self._here.pop(name, None)
            if mark is None:
                continue
            tensor = self._get(name)
            if _mark(tensor) != mark:
                changed.append(name)
            else:
                self._set(name, self.source.rest(name, tensor.detach()))
        self.keep(changed)

    def _follow(self) -> None:
        """Have what is not the shelf's, such as constants and adapters, on an accelerator too."""
        ours = frozenset(self.names)
        if self.device.type == "cpu":
            return
        for name, tensor in (*self.module.named_parameters(), *self.module.named_buffers()):
            if name not in ours and tensor.device != self.device and not tensor.is_meta:
                tensor.data = tensor.data.to(self.device)

    def _place(self, name: str) -> tuple[dict[str, Any], str]:
        path, _, leaf = name.rpartition(".")
        owner = self.module.get_submodule(path)
        return (owner._parameters if leaf in owner._parameters else owner._buffers), leaf

    def _get(self, name: str) -> Tensor:
        table, leaf = self._place(name)
        found: Tensor = table[leaf]
        return found

    def _set(self, name: str, tensor: Tensor) -> None:
        table, leaf = self._place(name)
        old = table[leaf]
        if isinstance(old, nn.Parameter):
            table[leaf] = nn.Parameter(tensor, requires_grad=old.requires_grad and tensor.is_floating_point())
        else:
            table[leaf] = tensor


class WholeShelf(Shelf):
    """All weights of a module at once."""

    def enter(self) -> None:
        """Get ready for use."""
        self.bring()

    def leave(self) -> None:
        """Give the memory back."""
        self.release()


class StreamingShelf(Shelf):
    """The weights of one block at a time, the next one being read meanwhile; what is in no block is there in use.

    Of a table of embeddings only the rows of the text at hand are there.
    """

    def __init__(self, module: nn.Module, source: Source, device: torch.device) -> None:
        super().__init__(module, source, device)
        self._active = False
        self._reader: ThreadPoolExecutor | None = None
        self._ahead: tuple[nn.Module, Future[dict[str, Tensor]]] | None = None
        path = next(path for path in BLOCKS if _at(module, path) is not None)
        blocks = _at(module, path)
        assert isinstance(blocks, nn.ModuleList)
        self._of_block = {
            block: tuple(f"{path}.{i}.{name}" for name in block.state_dict()) for i, block in enumerate(blocks)
        }
        owner, _, leaf = path.rpartition(".")
        module.get_submodule(owner)._modules[leaf] = StreamedBlocks(blocks, self)
        self._table = next((f"{path}.weight" for path in EMBEDDINGS if f"{path}.weight" in self.names), None)
        in_blocks = {name for names in self._of_block.values() for name in names}
        self._others = tuple(name for name in self.names if name not in in_blocks and name != self._table)
        if self._table is not None:
            layer = module.get_submodule(self._table.removesuffix(".weight"))
            layer.register_forward_pre_hook(self._give_rows)
            layer.register_forward_hook(self._take_rows)

    def enter(self) -> None:
        """Get ready for use."""
        self._active = True
        self.bring(self._others)
        self._follow()
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1, "sana-blocks")

    def leave(self) -> None:
        """Give the memory back."""
        self._active, self._ahead = False, None
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)
            self._reader = None
        self.release()

    def walk(self, blocks: Sequence[nn.Module]) -> Iterator[nn.Module]:
        """Yield blocks, each with its weights until the next one is asked for; outside of use, without."""
        for i, block in enumerate(blocks):
            if not self._active:
                yield block
                continue
            names = self._of_block[block]
            self.put(self._read(block))
            self._read_ahead(blocks[(i + 1) % len(blocks)])
            try:
                yield block
            finally:
                self.release(names)

    def _read(self, block: nn.Module) -> dict[str, Tensor]:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] is block:
            return ahead[1].result()
        return self.source.read(self._wanted(block))

    def _read_ahead(self, block: nn.Module) -> None:
        assert self._reader is not None
        self._ahead = (block, self._reader.submit(self.source.read, self._wanted(block)))

    def _wanted(self, block: nn.Module) -> list[str]:
        ours = frozenset(self.names)
        return [name for name in self._of_block[block] if name in ours]

    def _give_rows(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        name = self._table
        if not self._active or name is None or name not in self.names or name in self._here:
            return None
        kept, positions = torch.unique(args[0], return_inverse=True)
        rows = self.source.rows(name, kept.tolist())
        layer.weight = nn.Parameter(rows.to(self.device, self._dtypes[name]), requires_grad=False)
        return (positions, *args[1:])

    def _take_rows(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        name = self._table
        if self._active and name in self.names and name not in self._here:
            assert isinstance(layer, nn.Embedding)
            empty = torch.empty(layer.num_embeddings, layer.embedding_dim, dtype=self._dtypes[name], device="meta")
            layer.weight = nn.Parameter(empty, requires_grad=False)


class StreamedBlocks(nn.ModuleList):
    """A list of blocks that have their weights only while one goes through them in order."""

    def __init__(self, blocks: Iterable[nn.Module], shelf: StreamingShelf) -> None:
        super().__init__(blocks)
        self._shelf = shelf

    def __iter__(self) -> Iterator[nn.Module]:
        return self._shelf.walk(list(self._modules.values()))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return StreamedBlocks(list(self._modules.values())[index], self._shelf)
        return super().__getitem__(index)


def restore(module: nn.Module) -> None:
    """Give a streamed module its plain list of blocks back."""
    for path in BLOCKS:
        blocks = _at(module, path)
        if isinstance(blocks, StreamedBlocks):
            owner, _, leaf = path.rpartition(".")
            module.get_submodule(owner)._modules[leaf] = nn.ModuleList(blocks._modules.values())


def streams(module: nn.Module) -> bool:
    """Tell whether a module has blocks that can be streamed."""
    return any(isinstance(_at(module, path), nn.ModuleList) for path in BLOCKS)


def _at(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _mark(tensor: Tensor) -> tuple[int, int, int]:
    version = -1 if tensor.is_inference() else tensor._version
    return id(tensor), tensor.data_ptr(), version
