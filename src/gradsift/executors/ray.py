"""A Ray cluster: the pool pass as a Ray Data actor pool, trainings under Ray Train.

One model per actor, a GPU each where there are any. Ray restarts what dies and sends its work
elsewhere; a task returns only that it is done, its result lies in the run folder.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from gradsift.config import EngineConfig
from gradsift.errors import RunError, check_installed
from gradsift.executors.base import few_here, in_order
from gradsift.executors.environment import worker_environment
from gradsift.executors.ray_worker import (
    DEATHS,
    Actor,
    Begun,
    Failure,
    raise_failure,
    run_and_catch,
    too_many_died,
    train_loop,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")
Item = TypeVar("Item")
_TASKS_IN_FLIGHT = 2  # tasks at an actor: one is done, one is ready
_SECONDS_BETWEEN_LOOKS = 5.0
_CONNECT_TIMEOUT = 10.0  # seconds in which a cluster has to answer
_COLLECTIVE_TIMEOUT = 7 * 24 * 3600  # seconds: all wait while the first measures what was trained
_TRAINING_FAILURES = 3  # of machines, in one training


@dataclass(frozen=True)
class RayCluster:
    """The cluster at `address`; with none, the one that this process is in, or one begun here."""

    address: str | None
    workers: int | None
    train_workers: int

    @classmethod
    def of(cls, config: EngineConfig) -> RayCluster:
        """Return the cluster of some settings.

        Raises:
            ConfigError: If Ray is not installed.
            RunError: If nothing answers at the address.
        """
        check_installed("ray", "--engine ray", "ray")
        host, colon, port = (config.ray_address or "").rpartition(":")
        if colon and port.isdigit():  # Ray itself would try for minutes
            try:
                socket.create_connection(
                    (host.rpartition("/")[2], int(port)), _CONNECT_TIMEOUT
                ).close()
            except OSError as error:
                raise _unreachable(config.ray_address, error) from None
        workers = None if config.workers == "auto" else config.workers
        return cls(config.ray_address, workers, config.train_workers)

    def map(self, open_worker: Callable[[], Any], tasks: Sequence[Any]) -> Iterator[Any]:
        """Do the tasks in an actor pool, each actor with a worker of its own.

        The pool grows and shrinks with the cluster. A task whose actor or machine dies is done
        again by another.

        Raises:
            GradsiftError: The first that a worker raised.
            RunError: If workers died at a task again and again.
        """
        import ray.data

        share, count = self._connect(self.workers)
        if len(tasks) < (self.workers or count):
            message = (
                "%d shards to do for %d workers; a smaller engine.shard_size keeps all at work"
            )
            logger.warning(message, len(tasks), self.workers or count)
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # progress and log are our own
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        # as soon as actors are busy: by default the pool would not grow with few tasks ahead
        context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
        pool = ray.data.ActorPoolStrategy(
            min_size=1,
            max_size=self.workers,
            initial_size=min(count, len(tasks)),
            max_tasks_in_flight_per_actor=_TASKS_IN_FLIGHT,
        )
        numbers = [{"task": number} for number in range(len(tasks))]
        done = ray.data.from_items(numbers, override_num_blocks=len(tasks)).map_batches(
            Actor,
            fn_constructor_args=(
                str(Path.cwd()),
                _beside_driver(Begun),
                ray.put((open_worker, list(tasks))),
            ),
            batch_size=1,
            compute=pool,
            runtime_env={"env_vars": worker_environment()},
            **share,
        )
        seen: dict[str, int] = {}
        for row in done.iter_rows():
            raise_failure(row)
            if row["worker"] not in seen:
                logger.info("worker %d: %s", len(seen) + 1, row["worker"])
                seen[row["worker"]] = len(seen) + 1
            yield tasks[row["task"]]

    def call(self, work: Callable[[], T]) -> T:
        """Do it on one worker, again if that or its machine dies.

        Raises:
            GradsiftError: As the work does.
            RunError: If workers died at it again and again.
        """
        import ray

        share, _ = self._connect(self.workers)
        # tried again here: Ray has no limit for workers that it kills for want of memory
        task = ray.remote(run_and_catch).options(
            max_retries=0, runtime_env={"env_vars": worker_environment()}, **share
        )
        begin = partial(task.remote, str(Path.cwd()), work)
        return _result(begin(), begin)

    def stream(self, work: Callable[[Item], T], items: Iterable[Item]) -> Iterator[T]:
        """Do it in tasks all over the cluster, two for each processor; a few are done here.

        Raises:
            GradsiftError: As the work does.
            RunError: If workers died at a piece of it again and again.
        """
        yield from few_here(work, items, partial(self._stream, work))

    def _stream(self, work: Callable[[Item], T], items: Iterator[Item]) -> Iterator[T]:
        import ray

        _, count = self._connect(None)
        task = ray.remote(run_and_catch).options(
            num_cpus=1, max_retries=0, runtime_env={"env_vars": worker_environment()}
        )

        def begin(item: Item) -> tuple[Any, Callable[[], Any]]:
            again = partial(task.remote, str(Path.cwd()), partial(work, item))
            return again(), again

        processors = max(count, int(ray.cluster_resources().get("CPU", 1)))
        at_once = _TASKS_IN_FLIGHT * processors
        yield from in_order(begin, lambda begun: _result(*begun), items, at_once)

    def train(self, work: Callable[[], object]) -> None:
        """Do it under Ray Train, in `train_workers` processes.

        Raises:
            GradsiftError: As the work does.
            RunError: If machines died again and again.
        """
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.torch import TorchConfig, TorchTrainer

        share, count = self._connect(self.train_workers)
        if count < self.train_workers:
            logger.warning(
                "training waits for %d workers; there is room for %d", self.train_workers, count
            )
        gpus, failure = share["num_gpus"], _beside_driver(Failure)
        trainer = TorchTrainer(
            train_loop,
            train_loop_config={"folder": str(Path.cwd()), "work": work, "failure": failure},
            torch_config=TorchConfig(None if gpus else "gloo", timeout_s=_COLLECTIVE_TIMEOUT),
            scaling_config=ScalingConfig(
                num_workers=self.train_workers,
                use_gpu=bool(gpus),
                resources_per_worker={"GPU": 1} if gpus else {"CPU": share["num_cpus"]},
            ),
            run_config=RunConfig(
                failure_config=FailureConfig(max_failures=_TRAINING_FAILURES),
                worker_runtime_env={"env_vars": worker_environment()},
            ),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            raise_failure({"failure": ray.get(failure.get.remote())})
            raise RunError(f"the training failed on the cluster: {error}") from error
        raise_failure({"failure": ray.get(failure.get.remote())})

    def _connect(self, workers: int | None) -> tuple[dict[str, Any], int]:
        """Return the resources that each worker takes, and for how many workers there is room.

        Connects to the cluster first, or begins one, and waits for its first machine that works.

        Raises:
            RunError: If there is no such cluster.
        """
        import ray

        if not ray.is_initialized():
            where = f"connecting to {self.address}" if self.address else "beginning on this machine"
            logger.info("Ray: %s", where)
            try:
                ray.init(
                    address=self.address or "local",
                    include_dashboard=None if self.address else False,
                    log_to_driver=True,
                    logging_level=logging.WARNING,
                )
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise _unreachable(self.address, error) from error
            nodes, of_all = ray.nodes(), ray.cluster_resources()
            cpus, gpus = of_all.get("CPU", 0), of_all.get("GPU", 0)
            logger.info("Ray: %d machines, %g CPUs, %g GPUs", len(nodes), cpus, gpus)
        while not (found := _usable_machines()):
            logger.info("waiting for a machine of the Ray cluster that has CPUs")
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        gpus = [int(machine.get("GPU", 0)) for machine in found]
        if any(gpus):
            return {"num_gpus": 1, "num_cpus": 1}, min(sum(gpus), workers or sum(gpus))
        cpus = [int(machine["CPU"]) for machine in found]
        own = max(1, min([*cpus, sum(cpus) // (workers or len(cpus))]))
        room = sum(count // own for count in cpus)
        return {"num_gpus": 0, "num_cpus": own}, min(room, workers or room)


def _result(begun: Any, begin: Callable[[], Any]) -> Any:
    """Return what a task gives, which is begun again where its worker or machine dies.

    Raises:
        GradsiftError: As the task does.
        RunError: If workers died at it again and again.
    """
    import ray

    for task in chain([begun], (begin() for _ in range(DEATHS - 1))):
        try:
            outcome: Any = ray.get(task)
        except _deaths() as error:
            logger.warning("a worker died: %s", error)
            continue
        raise_failure(outcome)
        return outcome["value"]
    raise too_many_died()


def _unreachable(address: str | None, error: Exception) -> RunError:
    return RunError(
        f"no Ray cluster at {address!r}: {error}; start one with `ray start --head`, or leave "
        "--ray-address out to begin one on this machine"
    )


def _usable_machines() -> list[dict[str, float]]:
    """Return the resources of the machines that can work now."""
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [resources for resources in alive if resources.get("CPU", 0) >= 1]


def _beside_driver(kind: type) -> Any:
    """Return a process that keeps something of this kind beside the driver, to outlive the workers.

    It ends when nobody holds it any more.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(kind).options(num_cpus=0, scheduling_strategy=here).remote()


def _deaths() -> tuple[type[Exception], ...]:
    """Return what Ray raises when a worker or its machine is gone."""
    from ray import exceptions

    return (
        exceptions.WorkerCrashedError,
        exceptions.RayActorError,
        exceptions.OutOfMemoryError,
        exceptions.NodeDiedError,
        exceptions.ObjectLostError,
    )
