"""What a module holds and the optimiser does not update: frozen parameters and persistent buffers.

Every rank holds them alike, so rank 0 alone writes them, whole and in their own type. Frozen parameters are copied
to the host once; buffers, which forward may change, at each save. Buffers that differ between ranks (statistics of
each rank's own batches) are kept as rank 0 has them, as PyTorch's DistributedDataParallel keeps them; the save says
so, since a run that continues is then not the same to the bit.
"""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist
from safetensors.torch import save
from torch import nn

from arvideo_dist.train.checkpoint.manifest import TensorEntry, UntrainedEntry, type_name
from arvideo_dist.train.engine import zero_state
from arvideo_dist.train.engine.engine import Engine
from arvideo_dist.train.run.stop import RunStoppedError


class Untrained:
    """A copy on the host of a module's frozen parameters (rank 0 alone) and persistent buffers (every rank)."""

    def __init__(self, engine: Engine) -> None:
        """Collective. Raises RunStoppedError if the module has state that is neither parameter nor buffer."""
        self._module = engine.module
        if strange := sorted(self._module.state_dict().keys() - _all_tensors(self._module)):
            raise RunStoppedError(
                "a checkpoint of this module could not be resumed from: of its state_dict "
                f"{', '.join(strange[:5])} are neither parameters nor buffers. Register them as buffers"
            )
        self._frozen = zero_state.frozen_parameters(engine)
        self._buffers: dict[str, torch.Tensor] = {}
        self.is_empty = not persistent_buffers(self._module) and all(
            parameter.requires_grad for parameter in self._module.parameters()
        )

    def begin(self) -> None:
        """Step loop: a copy of the buffers as they are now; they may be changed from then on."""
        self._buffers = {name: b.detach().clone() for name, b in persistent_buffers(self._module).items()}

    def complete(self) -> None:
        """Background: the copy comes to the host. On a GPU, within a stream that waits for the step loop's."""
        self._buffers = {name: buffer.cpu() for name, buffer in self._buffers.items()}

    def content(self) -> bytes:
        """Rank 0: a safetensors file of all."""
        return save({name: tensor.contiguous() for name, tensor in self._tensors().items()})

    def entry(self, part: str) -> UntrainedEntry:
        """What a manifest says of it; `part` holds the content."""
        tensors = {
            n: TensorEntry(shape=list(t.shape), dtype=type_name(t)) for n, t in self._tensors().items()
        }
        return UntrainedEntry(part=part, tensors=tensors)

    def buffers_digest(self) -> str:
        """Of this rank's buffers."""
        digest = hashlib.sha256()
        for name, buffer in sorted(self._buffers.items()):
            digest.update(name.encode())
            digest.update(_bytes_of(buffer.contiguous()).numpy().data)
        return digest.hexdigest()

    def _tensors(self) -> dict[str, torch.Tensor]:
        return self._frozen | self._buffers


def persistent_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Those that are part of the module's state, by name."""
    state = module.state_dict().keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in state}


def broadcast(tensor: torch.Tensor, group: dist.ProcessGroup) -> None:
    """`tensor` on the CPU becomes what rank 0 of gloo `group` has, whatever its type. Collective."""
    whole = tensor.detach().contiguous()
    dist.broadcast(_bytes_of(whole), group_src=0, group=group)
    if whole.data_ptr() != tensor.data_ptr():
        tensor.detach().copy_(whole)


def _bytes_of(contiguous: torch.Tensor) -> torch.Tensor:
    return contiguous.view(-1).view(torch.uint8)  # gloo knows few types


def _all_tensors(module: nn.Module) -> set[str]:
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return parameters | {name for name, _ in module.named_buffers(remove_duplicate=False)}
