"""What the commands do: a run from its config to its student, an evaluation, a few rollouts to look at.

In: a checked config. Out: a run folder, or numbers and rollouts on the console. Everything that can be refused is
refused before an actor starts.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from switchkd.config import resources
from switchkd.config.loader import ConfigError
from switchkd.config.schema import Config, Stage
from switchkd.controller import local
from switchkd.controller.adaptive import Adaptive
from switchkd.controller.checkpoint import RunFolder, TrainState, open_run
from switchkd.controller.evaluation import Examiner
from switchkd.controller.handles import House
from switchkd.controller.metrics import MetricsLog
from switchkd.controller.model_card import write_card
from switchkd.controller.preflight import Ready, prepare, prepare_teacher
from switchkd.controller.schedule import RunPlan
from switchkd.controller.text_metrics import EvalRow, aggregate
from switchkd.controller.watchdog import Watchdog
from switchkd.data.atomic_files import write_json_atomic
from switchkd.data.prompts import PromptStream
from switchkd.engines.build import make_worker
from switchkd.rollout.worker import Worker
from switchkd.train import Trainer
from switchkd.types import Prompt, Rollout


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """How a run ended. Written to summary.json."""

    run_dir: str
    student: str
    steps: int
    finished: bool
    stopped_early: bool
    best: float | None
    best_step: int | None
    elapsed_s: float
    stage_scores: tuple[tuple[str, dict[str, float]], ...]
    told_to_stop: bool = False  # SIGTERM came, be it behind the last step


def train(config: Config, *, resume: bool = False) -> Summary:
    """Run a config to its end, or to SIGTERM. Raises ConfigError before anything is started or overwritten."""
    ready = prepare(config)
    log = MetricsLog(ready.config.metrics)
    try:
        return _train(ready, log, resume)
    finally:
        log.close()


def _train(ready: Ready, log: MetricsLog, resume: bool) -> Summary:
    config = ready.config
    log.note(f"data: {config.rollout.recorded or ready.prompts.report()}")
    _check_room(config, log)
    with open_run(config, resume) as folder:
        plan = _plan(ready)
        checkpoint = folder.checkpoint
        log.open(folder.path, plan.num_steps, checkpoint.state if checkpoint else TrainState())
        with ExitStack() as opened:
            dog = Watchdog(config.run.watchdog_s, folder.path, log.note)
            opened.callback(dog.stop)
            dog.start()
            house = _build_house(ready, folder, log)
            opened.callback(house.close)
            opened.callback(dog.progress, "the actors to end")
            dog.pulses = house.pulses
            dog.progress("the first step")
            trainer = Trainer(config, plan, house, folder, log, _examiner(ready), dog)
            if checkpoint is not None:
                trainer.resume(checkpoint)
            state = trainer.run()
        summary = _summary(folder, state, plan, told_to_stop=bool(trainer.stop_signal))
        if summary.student:
            write_card(Path(summary.student), folder.path, config, summary.stage_scores, _student_steps(summary))
        write_json_atomic(folder.path / "summary.json", asdict(summary))
    log.summary(summary.stage_scores, summary.student, summary.finished)
    return summary


def _student_steps(summary: Summary) -> int:
    """After which step `student/` was saved: with `train.select_by` that is the best one."""
    return summary.steps if summary.best_step is None else summary.best_step


def _check_room(config: Config, log: MetricsLog) -> None:
    """ConfigError when the machine, or the cluster that is joined here, is too small. Starts nothing."""
    from switchkd.actors import process_setup

    if config.run.mode == "inprocess":
        local.check_single(config)
    elif resources.is_private(config):
        _check_private(config)
        process_setup.for_private_cluster()
    else:
        from switchkd.actors import launch

        launch.join(config, log)
        return
    resources.check(config, _this_machine())


def _check_private(config: Config) -> None:
    """ConfigError for what only a joined cluster has."""
    for role in resources.counts(config):
        if labels := resources.of_role(config, role).labels:
            raise ConfigError(
                f"resources.{role}.labels={labels}: nodes of a joined cluster have labels, a private cluster has none; "
                "set cluster.address or remove them"
            )
    for name in config.teacher_names:
        if wanted := config.of_teacher(name).teacher.attach:
            raise ConfigError(
                f"{resources.role_of(name)}.attach={wanted} needs the cluster on which that teacher is served: set "
                "cluster.address (auto, host:port) or start the run there as a job"
            )


def _this_machine() -> dict[str, float]:
    import torch

    return {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}


def _build_house(ready: Ready, folder: RunFolder, log: MetricsLog) -> House:
    if ready.config.run.mode == "inprocess":
        return local.build_house(ready.config, folder.path, ready.stop_ids)
    from switchkd.actors import launch

    return launch.build_house(ready.config, folder.path, ready.stop_ids, log)


def _plan(ready: Ready, stages: tuple[Stage, ...] | None = None) -> RunPlan:
    """Of the run's stages, or of others."""
    config = ready.config
    stream = PromptStream(ready.prompts.prompts, seed=config.seed, shuffle=config.data.shuffle)
    samples, replay, adaptive = config.rollout.samples_per_prompt, config.replay, None
    if replay.policy == "adaptive" and stages is None:  # other stages are looked at, not trained
        adaptive = Adaptive(numbers=replay.phi, capacity=replay.capacity, every=config.eval.every)
    return RunPlan(
        stages or config.train.stages, stream, seed=config.seed, samples_per_prompt=samples, adaptive=adaptive
    )


def _examiner(ready: Ready) -> Examiner:
    prompts = ready.eval_prompts.prompts if ready.eval_prompts else ()
    return Examiner(ready.config.eval, prompts, has_teacher=ready.config.needs_teacher)


def _summary(folder: RunFolder, state: TrainState, plan: RunPlan, *, told_to_stop: bool) -> Summary:
    finished = state.step >= plan.num_steps or state.stopped_early
    student = folder.path / "student"
    return Summary(
        run_dir=str(folder.path.resolve()),
        student=str(student.resolve()) if student.exists() else "",
        steps=state.step,
        finished=finished,
        stopped_early=state.stopped_early,
        best=state.best,
        best_step=state.best_step,
        elapsed_s=state.elapsed_s,
        stage_scores=state.stage_scores,
        told_to_stop=told_to_stop,
    )


# --- without a run ---------------------------------------------------------------------------------------------------


def evaluate(config: Config) -> dict[str, float]:
    """Scores of the student that the config names, by metric, on `eval.data`, in this process."""
    rows, prompts = examined(config)
    scores = aggregate(rows, config.eval.metrics, prompts)
    by_metric = {name.removeprefix("eval/"): value for name, value in scores.items()}
    return {**by_metric, "num_prompts": len(prompts)}


def examined(config: Config) -> tuple[list[EvalRow], list[Prompt]]:
    """What that student wrote on `eval.data`, text by text, and the prompts that `EvalRow.index` counts."""
    if not config.eval.data:
        raise ConfigError("eval.data is empty; name a JSONL or parquet file with prompts and references")
    ready = prepare(config)
    examiner = _examiner(ready)
    return examiner.rows([local.DirectWorker(_worker(ready), None)]), examiner.prompts


def sample(config: Config, num: int, stage: int) -> tuple[list[tuple[Prompt, Rollout]], Worker]:
    """The first rollouts of a stage, each with its prompt, and who wrote them. In this process, and written anew also
    where the run trains on recorded ones."""
    anew = config.rollout.model_copy(update={"recorded": ""})
    ready = prepare(config.model_copy(update={"rollout": anew}))
    worker = _worker(ready)
    return written(ready, worker, num, stage), worker


def written(ready: Ready, worker: Worker, num: int, stage: int) -> list[tuple[Prompt, Rollout]]:
    """The first rollouts of a stage as a run with the student's present weights makes them (more of them where the
    stage is shorter), each with its prompt."""
    stages = ready.config.train.stages[: stage + 1]
    steps = max(stages[-1].steps, -(-num // stages[-1].batch_size))
    plan = _plan(ready, (*stages[:-1], stages[-1].model_copy(update={"steps": steps})))
    tasks = [plan.task(plan.first_id(plan.num_steps - steps) + i) for i in range(num)]
    found: dict[int, Rollout] = {}
    worker.generate(tasks, lambda rollouts: found.update({rollout.rollout_id: rollout for rollout in rollouts}))
    return [(task.prompt, found[task.rollout_id]) for task in tasks]


def _worker(ready: Ready) -> Worker:
    """One that has this process, and with it all cores, to itself."""
    run = ready.config.run.model_copy(update={"mode": "inprocess"})
    config = ready.config.model_copy(update={"run": run})
    return make_worker(config, 0, local.make_teachers(config), ready.stop_ids)


def serve_teacher(config: Config, name: str) -> int:
    """Start a named teacher on the cluster that the config joins; the number of its replicas. Raises ConfigError."""
    if "/" in name or not name:  # what belongs to it is found by its name and a slash
        raise ConfigError(f"--name {name!r}: choose a name without a slash")
    wanted, vocab_size = prepare_teacher(config)
    if resources.is_private(wanted):
        raise ConfigError(
            "serve-teacher needs a cluster that outlives it: set cluster.address (auto, host:port) or start it as a job"
        )
    from switchkd.actors import launch, shared_teacher

    log = MetricsLog(wanted.metrics)
    try:
        launch.connect(wanted.cluster.address)
        return shared_teacher.serve(wanted, name, vocab_size, log.note)
    finally:
        log.close()


def stop_teacher(name: str, address: str) -> None:
    """End a teacher that `serve_teacher` started on the cluster at this address. Raises ConfigError."""
    from switchkd.actors import launch, shared_teacher

    launch.connect(address)
    shared_teacher.stop(name)
