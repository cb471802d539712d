"""What the benches need of Ray itself: a small cluster of their own, and two processes that time a weight's way.

The only file outside actors/ that imports ray. Import it late: `cluster` first protects what Ray reads at import.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import ray

from switchkd.actors.ray_futures import shut_down
from switchkd.types import PackedWeights

if TYPE_CHECKING:
    from switchkd.types import PackedWeights


@contextmanager
def cluster(num_cpus: float, object_store_mb: int, setup_hook: Callable[[], None] | None = None) -> Iterator[None]:
    """A Ray of this process alone, in a folder of its own; call `process_setup.for_private_cluster` before.
    `setup_hook` (a plain function) runs in each of its processes before anything else."""
    # Ray lets its workers wait behind every other program of the machine
    os.environ.setdefault("RAY_worker_niceness", "0")
    folder = tempfile.mkdtemp(prefix="skd-", dir="/tmp")  # a socket's path must be short
    try:
        ray.init(
            address="local",
            num_cpus=int(num_cpus),
            include_dashboard=False,
            object_store_memory=object_store_mb * 2**20,
            logging_level="ERROR",
            log_to_driver=False,
            _temp_dir=folder,
            runtime_env={} if setup_hook is None else {"worker_process_setup_hook": setup_hook},
        )
        yield
    finally:
        shut_down()
        shutil.rmtree(folder, ignore_errors=True)


def object_store_mb() -> float:
    """Of all objects in the store of this process's cluster (named: there may be others on this machine)."""
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    stats = get_memory_info_reply(get_state_from_address(ray.get_runtime_context().gcs_address)).store_stats
    return stats.object_store_bytes_used / 2**20


@ray.remote
class LearnerProcess:
    """Packs, and puts into the object store, as `actors.learner_actor` does."""

    def __init__(self, folder: str, dtype: str, device: str, threads: int) -> None:
        self.learner = Learner(folder, dtype, device, threads)

    def publish(self, version: int) -> tuple[list[Any], float, float]:
        """A reference, seconds to pack, seconds to put."""
        bundle, pack_s = self.learner.publish(version)
        start = time.perf_counter()
        return [ray.put(bundle)], pack_s, time.perf_counter() - start


@ray.remote
class ReaderProcess:
    """Pulls and loads, as `actors.rollout_actor` does."""

    def __init__(self, folder: str, dtype: str, device: str, threads: int) -> None:
        self.reader = Reader(folder, dtype, device, threads)

    def ready(self) -> bool:
        return True

    def take(self, packed: list[Any]) -> tuple[float, float]:
        """Seconds to pull, seconds to load."""
        start = time.perf_counter()
        bundle: PackedWeights = ray.get(packed[0])
        pull_s = time.perf_counter() - start
        return pull_s, self.reader.load(bundle)


class TwoProcesses:
    """A learner and a reader, and one publication after the other."""

    def __init__(self, folder: str, dtype: str, device: str, threads: int) -> None:
        gpus = 0.5 if device == "cuda" else 0.0
        self.learner = cast(Any, LearnerProcess).options(num_gpus=gpus).remote(folder, dtype, device, threads)
        self.reader = cast(Any, ReaderProcess).options(num_gpus=gpus).remote(folder, dtype, device, threads)
        ray.get(self.reader.ready.remote())
        self.version = 0

    def publish(self) -> dict[str, float]:
        self.version += 1
        packed, pack_s, put_s = ray.get(self.learner.publish.remote(self.version))
        pull_s, load_s = ray.get(self.reader.take.remote(packed))
        return {"pack": pack_s, "put": put_s, "pull": pull_s, "load": load_s}


class Learner:
    """A model that is published as `DeepSpeedLearner.publish` does without partitions."""

    def __init__(self, folder: str, dtype: str, device: str, threads: int) -> None:
        import torch

        from switchkd.engines.models.loading import load_model

        torch.set_num_threads(threads)
        self.dtype = dtype
        self.model = load_model(folder, dtype=dtype, device=device)

    def publish(self, version: int) -> tuple[PackedWeights, float]:
        """The bundle and the seconds that packing took."""
        from switchkd.engines.weights import pack
        from switchkd.learner.loss_module import full_tensors

        start = time.perf_counter()
        bundle = pack(full_tensors(self.model, lambda _: nullcontext()), version, dtype=self.dtype)
        return bundle, time.perf_counter() - start


class Reader:
    """A rollout worker's student engine."""

    def __init__(self, folder: str, dtype: str, device: str, threads: int) -> None:
        import torch

        from switchkd.engines.hf.student import HFStudent
        from switchkd.engines.models.loading import load_model, load_tokenizer, shared_vocab

        torch.set_num_threads(threads)
        self.device = device
        vocab_size = shared_vocab(load_tokenizer(folder))
        self.engine = HFStudent(
            load_model(folder, dtype=dtype, device=device), num_slots=1, max_len=16, vocab_size=vocab_size
        )

    def load(self, bundle: PackedWeights) -> float:
        """Seconds until the engine can write with them."""
        import torch

        start = time.perf_counter()
        self.engine.load_weights(bundle)
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start
