"""A small Ray cluster for the benches, and two actors that time the transfer of a weight version.

The only file outside actors/ that imports ray. Trap: import it after `process_setup.for_private_cluster`, since Ray
reads the environment at import.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import ray

from switchkd.actors.ray_futures import shut_down


@contextmanager
def cluster(num_cpus: int, object_store_mb: int) -> Iterator[None]:
    """Start a private Ray in its own folder."""
    # by default Ray gives its workers a low CPU priority
    os.environ.setdefault("RAY_worker_niceness", "0")
    folder = tempfile.mkdtemp(prefix="skd-", dir="/tmp")  # a socket's path must be short
    try:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            object_store_memory=object_store_mb * 2**20,
            logging_level="ERROR",
            log_to_driver=False,
            _temp_dir=folder,
        )
        yield
    finally:
        shut_down()
        shutil.rmtree(folder, ignore_errors=True)


def object_store_mb() -> float:
    """Return the size of all objects in this cluster's store (by address: the machine may run other clusters)."""
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    stats = get_memory_info_reply(get_state_from_address(ray.get_runtime_context().gcs_address)).store_stats
    return stats.object_store_bytes_used / 2**20


class WeightSender:
    """Publishes a model as `DeepSpeedLearner.publish` does without partitions."""

    def __init__(self, folder: str, dtype: str, device: str, threads: int) -> None:
        import torch

        from switchkd.engines.models.loading import load_model

        torch.set_num_threads(threads)
        self.dtype = dtype
        self.model = load_model(folder, dtype=dtype, device=device)

    def publish(self, to_store: bool) -> tuple[Any, dict[str, float]]:
        """Return the packed weights, or a list with their reference, and the seconds to pack and to put."""
        from switchkd.engines.weights import pack
        from switchkd.learner.loss_module import full_tensors

        start = time.perf_counter()
        packed = pack(full_tensors(self.model, lambda _: nullcontext()), 1, dtype=self.dtype)
        packed_at = time.perf_counter()
        weights = [ray.put(packed)] if to_store else packed
        return weights, {"pack": packed_at - start, "put": time.perf_counter() - packed_at}


class WeightReceiver:
    """A rollout worker's student engine."""

    def __init__(self, folder: str, dtype: str, device: str, threads: int) -> None:
        import torch

        from switchkd.engines.hf.student import HFStudent
        from switchkd.engines.models.loading import load_model, load_tokenizer, shared_vocab

        torch.set_num_threads(threads)
        self.device = device
        vocab_size = shared_vocab(load_tokenizer(folder))
        model = load_model(folder, dtype=dtype, device=device)
        self.engine = HFStudent(model, num_slots=1, max_len=16, vocab_size=vocab_size)

    def receive(self, weights: Any) -> dict[str, float]:
        """Fetch and load the result of `publish`. Returns the seconds of both."""
        import torch

        start = time.perf_counter()
        packed = ray.get(weights[0]) if isinstance(weights, list) else weights
        fetched_at = time.perf_counter()
        self.engine.load_weights(packed)
        if self.device == "cuda":
            torch.cuda.synchronize()
        return {"fetch": fetched_at - start, "load": time.perf_counter() - fetched_at}


def remote_pair(folder: str, dtype: str, device: str, threads: int) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """Start a sender and a receiver, a process each. Returns the sender's `publish` and the receiver's `receive`."""
    num_gpus = 0.5 if device == "cuda" else 0.0
    sender, receiver = (
        cast(Any, ray.remote(actor)).options(num_gpus=num_gpus).remote(folder, dtype, device, threads)
        for actor in (WeightSender, WeightReceiver)
    )
    ray.get([sender.__ray_ready__.remote(), receiver.__ray_ready__.remote()])
    return (
        lambda: ray.get(sender.publish.remote(to_store=True)),
        lambda weights: ray.get(receiver.receive.remote(weights)),
    )
