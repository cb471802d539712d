"""Packs a student weight version into flat buckets, and loads it from them into another model.

In: named tensors on any device, one after the other (a generator may free each one before it makes the next).
Out: PackedWeights: uint8 buckets in host memory, a manifest (name, dtype, shape, bucket, offset, nbytes), a checksum.
"""

from __future__ import annotations

import warnings
import weakref
import zlib
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from switchkd.types import PackedWeights

BUCKET_BYTES = 256 * 2**20
_ALIGN = 64  # a view as any dtype needs an aligned start

ManifestEntry = tuple[str, str, tuple[int, ...], int, int, int]


def pack(
    named_tensors: Iterable[tuple[str, Tensor]],
    version: int,
    bucket_bytes: int = BUCKET_BYTES,
    *,
    dtype: str | torch.dtype | None = None,
) -> PackedWeights:
    """Copy tensors into buckets of `bucket_bytes` (a larger tensor gets its own bucket).

    `dtype` casts floating-point tensors, such as fp32 masters to the rollout workers' bfloat16. Tensors that share
    their memory (tied weights) are packed once, under the first name.
    """
    cast_to = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    writer = _BucketWriter(bucket_bytes)
    packed_before: dict[tuple, weakref.ref[Tensor]] = {}
    for name, tensor in named_tensors:
        place = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        earlier = packed_before.get(place, lambda: None)()  # None also where a tensor got the memory of a freed one
        if earlier is None or tensor.numel() == 0:
            packed_before[place] = weakref.ref(tensor)
            writer.write(name, tensor, cast_to)
    buckets = writer.finish()
    manifest = tuple(writer.manifest)
    return PackedWeights(version=version, manifest=manifest, buckets=buckets, checksum=_checksum(manifest, buckets))


def unpack(packed: PackedWeights) -> list[tuple[str, Tensor]]:
    """Names and tensors, as read-only views of the buckets. Raises ValueError for a wrong checksum."""
    checksum = _checksum(packed.manifest, packed.buckets)
    if checksum != packed.checksum:
        raise ValueError(
            f"weights of version {packed.version} are damaged (checksum {checksum}, not {packed.checksum}): publish "
            "again"
        )
    named_tensors = []
    with warnings.catch_warnings():  # arrays from an object store are read-only, which torch warns about
        warnings.simplefilter("ignore", UserWarning)
        for name, dtype, shape, bucket, offset, nbytes in packed.manifest:
            flat = torch.from_numpy(packed.buckets[bucket][offset : offset + nbytes])
            named_tensors.append((name, flat.view(getattr(torch, dtype)).reshape(shape)))
    return named_tensors


@torch.no_grad()
def load_into(module: nn.Module, packed: PackedWeights) -> None:
    """Overwrite all weights of `module`, cast to its dtypes. Raises ValueError, before anything is written, where a
    weight is missing, unknown or of another shape.

    Each parameter must be present under one of its names (tied weights have several), persistent buffers need not be.
    """
    targets: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    needed = {id(tensor) for tensor in targets.values()}
    targets |= {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if name not in targets}
    _check_fit(packed, targets, needed)
    for name, tensor in unpack(packed):
        targets[name].copy_(tensor)


def _check_fit(packed: PackedWeights, targets: dict[str, Tensor], needed: set[int]) -> None:
    covered = set()
    for name, _, shape, *_ in packed.manifest:
        if name not in targets:
            raise ValueError(f"weights of version {packed.version} hold {name}, the model does not: another student?")
        if tuple(targets[name].shape) != shape:
            raise ValueError(
                f"weights of version {packed.version}: {name} is {list(shape)}, the model's {list(targets[name].shape)}"
            )
        covered.add(id(targets[name]))
    missing = next((name for name, tensor in targets.items() if id(tensor) in needed - covered), None)
    if missing is not None:
        raise ValueError(f"weights of version {packed.version} lack {missing}, the model does not: another student?")


class _BucketWriter:
    """Fills buckets one after the other."""

    def __init__(self, bucket_bytes: int) -> None:
        self.bucket_bytes = bucket_bytes
        self.manifest: list[ManifestEntry] = []
        self._buckets: list[np.ndarray] = []
        self._used = 0  # bytes of the last bucket

    def write(self, name: str, tensor: Tensor, dtype: torch.dtype | None) -> None:
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        flat = tensor.detach().contiguous().reshape(-1)
        nbytes = flat.numel() * flat.element_size()
        offset = self._reserve(nbytes)
        target = torch.from_numpy(self._buckets[-1][offset : offset + nbytes])
        target.copy_(flat.view(torch.uint8))  # raw bytes, since NumPy has no bfloat16
        dtype_name = str(tensor.dtype).removeprefix("torch.")
        self.manifest.append((name, dtype_name, tuple(tensor.shape), len(self._buckets) - 1, offset, nbytes))

    def finish(self) -> tuple[np.ndarray, ...]:
        self._close()
        return tuple(self._buckets)

    def _reserve(self, nbytes: int) -> int:
        offset = -(-self._used // _ALIGN) * _ALIGN
        if not self._buckets or offset + nbytes > len(self._buckets[-1]):
            self._close()
            # memory that is never written costs nothing, so the last bucket may be far too long
            self._buckets.append(np.empty(max(nbytes, self.bucket_bytes), np.uint8))
            offset = 0
        elif offset > self._used:
            self._buckets[-1][self._used : offset] = 0  # the checksum covers the gap
        self._used = offset + nbytes
        return offset

    def _close(self) -> None:
        if self._buckets:
            self._buckets[-1] = self._buckets[-1][: self._used]


def _checksum(manifest: tuple[ManifestEntry, ...], buckets: tuple[np.ndarray, ...]) -> str:
    """CRC-32 of manifest and buckets: 2.6 GB/s on one core, four times a cryptographic one."""
    crc = zlib.crc32(repr(manifest).encode())
    for bucket in buckets:
        crc = zlib.crc32(bucket.data, crc)
    return f"{crc:08x}"
