"""The keys of a config file: one class per section, each key with its default and its meaning.

Imports nothing heavy. `loader.py` reads files into these classes and names mistakes in them.
"""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from switchkd.config.kinds import (
    Arguments,
    Beta,
    Budget,
    Device,
    File,
    Folder,
    Frac,
    Int,
    Name,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveFrac,
    PositiveInt,
    PositiveSeconds,
    Seconds,
    Seed,
    Temperature,
    Text,
    is_number,
    no_repeats,
    placeholders,
)

FORMAT = 3
"""The format of configs and run folders. It grows when the results of a seed, or the meaning of a file, change."""
Dtype = Literal["float32", "bfloat16", "float16"]
Scheduler = Literal["constant", "linear", "cosine"]
Metric = Literal["rouge_l", "exact_match", "agreement", "kl", "loss"]
Switch = Annotated[
    Literal["auto", "on", "off"],
    BeforeValidator(lambda value: {True: "on", False: "off"}[value] if isinstance(value, bool) else value),
]
"""YAML reads a bare on or off as true or false."""


class Section(BaseModel):
    """A group of keys. Unknown keys, infinity and NaN are errors; values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class ReplicaRange(Section):
    """A pool that grows and shrinks between two numbers of processes (see `actors/autoscaling.py`)."""

    min: PositiveInt = 1
    max: PositiveInt

    @model_validator(mode="after")
    def _ordered(self) -> ReplicaRange:
        if self.min > self.max:
            raise ValueError(f"min={self.min} is above max={self.max}; swap them")
        return self

    @classmethod
    def of(cls, count: int | ReplicaRange) -> ReplicaRange:
        """Return a range; a plain number neither grows nor shrinks."""
        return count if isinstance(count, ReplicaRange) else cls(min=count, max=count)


Count = Annotated[
    Annotated[PositiveInt, Tag("<one>")] | Annotated[ReplicaRange, Tag("<several>")],
    Discriminator(lambda value: "<several>" if isinstance(value, dict | ReplicaRange) else "<one>"),
]
"""A number of processes, or `{min: 1, max: 4}`."""


class RunConfig(Section):
    dir: Folder
    """The run's folder. Relative to the working directory; absolute (on shared storage) for submitted jobs."""
    mode: Literal["ray", "inprocess"] = "ray"
    """`ray` joins the cluster of a job or of `cluster.address`, else starts one here; `inprocess` uses no Ray."""
    overwrite: bool = False
    """Rename a folder that holds another run, and begin a new run."""
    watchdog_s: PositiveSeconds = 1800.0
    """A run without progress for so long names the actor it waits for, saves, and ends. An actor has 5 min to start."""
    max_restarts: NonNegativeInt = 8
    """How often a run goes back to one checkpoint after losing a learner rank or the replay, before it ends."""


class ModelConfig(Section):
    path: Folder = "demo"
    """A folder, a hub name, or `demo` (SmolLM2-135M-Instruct, see `switchkd fetch-demo`)."""
    revision: Name | None = None
    dtype: Dtype = "float32"
    device: Device = "auto"
    """`auto` (a GPU when the process sees one), `cpu`, `cuda`, `cuda:1`."""
    attn: Literal["sdpa", "eager"] = "sdpa"
    """transformers' attention. Architectures without `sdpa` (GPT-OSS, GPT-J, MPT) use `eager` also then."""
    graphs: Switch = "auto"
    """Record short forward passes as CUDA graphs. `auto`: models on one GPU (teachers: with output `hidden_states`)."""
    prepack: Switch = "auto"
    """On a CPU: keep a second copy of the weights, in its matrix unit's order. `auto`: models up to 4 GB."""
    trust_remote_code: bool = False
    temperature: Temperature | None = None
    """Sampling temperature; 0 is greedy. Null takes that of the rule's paper (else 1)."""
    top_p: PositiveFrac | None = None
    top_k: NonNegativeInt | None = None


class TeacherConfig(ModelConfig):
    backend: Literal["hf", "vllm", "fake"] = "hf"
    """`hf` runs any causal transformers model; `vllm`, a separate install (see `actors/README.md`), is for large ones;
    `fake` (with `student.backend` and `learner.backend`) loads no model: for trying a cluster."""
    engine: Arguments = {}
    """With `vllm`: its engine arguments, passed on unchanged (`tensor_parallel_size`, `quantization`, ...)."""
    output: Literal["hidden_states", "logits", "top_logprobs"] = "hidden_states"
    """The rows that it sends, one per position: its hidden state, all logits, or its most likely ids with the mass and
    the entropy of the rest. With these, rules see the rest as one bin, the teacher draws from these ids only, and every
    rollout is marked approximate."""
    num_top_logprobs: PositiveInt = 64
    """With `top_logprobs`: the number of ids."""
    replicas: Count = 1
    """A number, or `{min: 1, max: 4}`: one is added while calls wait, one is drained while the others suffice."""
    attach: Text = ""
    """Use the running teacher of this name (`switchkd serve-teacher`). `path` must name the same model."""
    max_sessions: PositiveInt = 64
    lease_s: PositiveSeconds = 600.0
    """A session that is unused for this time is closed."""
    device_map: Name | None = None


class DepthPruneConfig(Section):
    """Prune the teacher by depth to the student, once, before training (see `switchkd init-student`)."""

    layers: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] | None = None
    num_layers: PositiveInt | None = None
    """Keep so many layers, chosen as `by` says. Give this or `layers`."""
    by: Literal["importance", "block", "even"] = "importance"
    """Remove the layers, or the `block` of layers, that cost least on the first rows of `data`; or keep `even` ones."""

    @model_validator(mode="after")
    def _one(self) -> DepthPruneConfig:
        if (self.layers is None) == (self.num_layers is None):
            raise ValueError("give exactly one of layers and num_layers")
        return self


class StudentConfig(ModelConfig):
    backend: Literal["hf", "fake"] = "hf"
    prune: DepthPruneConfig | None = None
    """When set, `path` is not read: the student is pruned from the teacher."""


class DataConfig(Section):
    path: File = ""
    """JSONL or parquet (relative to the config file), a hub name (`name:subset`), or `hf://datasets/owner/name/file`."""
    split: Name = "train"
    """The split of a hub name. Any kind can be sliced: `train[500:]`, `train[:500]`."""
    prompt_field: Name = "prompt"
    input_field: Text | None = None
    """A second field of the prompt (a context, an input); its text follows after a blank line."""
    reference_field: Name = "reference"
    """A text, or a list of texts, of which the first is trained on."""
    teacher_field: Name = "teacher"
    """With `teachers`: the field that names a prompt's teacher."""
    messages_field: Text | None = None
    """A field of chat messages. The assistant's message at the end is the reference; without it all are the prompt."""
    template: Annotated[Text, placeholders("{prompt}")] | None = None
    """A text with {prompt}, and {{ }} for braces; by default the tokenizer's chat template, else the bare prompt."""
    template_with_input: Annotated[Text, placeholders("{prompt}", "{input}")] | None = None
    """Instead of `template` where `input_field` holds text: a text with {prompt} and {input}."""
    system: Text | None = None
    escape_special: bool = False
    """Break special tokens that a prompt's text spells, such as `<|im_end|>`, with a zero-width space after their first
    character, so that only the template's own are real. False: they become real ones, as in `apply_chat_template`."""
    date: datetime.date | None = None
    """The day that a chat template writes (`strftime_now`). Null: the run's first day, which a resume keeps."""
    max_prompt_tokens: PositiveInt = 512
    max_reference_tokens: PositiveInt = 512
    max_skipped_frac: Frac = 0.1
    max_quarantined_frac: Frac = 0.01
    """A rollout that fails three times while others finish is quarantined. More than this share ends the run."""
    num_rows: PositiveInt | None = None
    shuffle: bool = True


class SamplingConfig(Section):
    temperature: Temperature | None = None
    top_p: PositiveFrac | None = None
    top_k: NonNegativeInt | None = None


class StepScheduleConfig(Section):
    """Multiply the rule's threshold over the stage's steps, from `start` to `end`."""

    start: NonNegativeFloat = 1.0
    end: NonNegativeFloat = 1.0


class RuleConfig(Section):
    """Who writes the next token (`algo/switching.py`). Null: the rule's default; keys of other rules are errors."""

    type: Name = "jsd_threshold"
    """A name, or `my_file:my_rule` from the working directory: your own code, which runs with your rights."""
    tau0: NonNegativeFloat | None = None
    decay: NonNegativeFloat | None = None
    half_life: PositiveFloat | None = None
    """In tokens; instead of `decay`."""
    schedule: Literal["exponential", "linear", "constant", "exponential_growth"] | None = None
    log_base: PositiveFloat | None = None
    window: PositiveInt | None = None
    """AdaSwitch's L."""
    factor: PositiveFloat | None = None
    """AdaSwitch's K."""
    divergence: Literal["kl", "reverse_kl", "jsd"] | None = None
    warm_up: Literal["full_window", "available"] | None = None
    min_divergence: NonNegativeFloat | None = None
    """AdaSwitch switches above this divergence only (1e-6 nats): where the models agree, the window is rounding."""
    top_k: PositiveInt | None = None
    """SKD's K: a drafted id outside the teacher's first K is replaced."""
    prob: Frac | None = None
    """The teacher's share under `random` and `mixture`."""
    params: dict[str, Any] = {}
    """Parameters of a rule of your own (`my_file:my_rule`); an error for others."""
    student: SamplingConfig = SamplingConfig()
    """Sampling in this stage; null takes `student.temperature` and so on."""
    teacher: SamplingConfig = SamplingConfig()
    teacher_budget: Budget | None = None
    """Largest number of teacher tokens: a float is a share of max_new_tokens, an int a number of tokens."""
    step_schedule: StepScheduleConfig | None = None


class LossConfig(Section):
    """The loss (`algo/losses.py`). Null takes the loss's own default."""

    type: Name = "forward_kl"
    """A name, or `my_file:my_loss` from the working directory: your own code, which runs with your rights."""
    alpha: Frac | None = None
    """The mixing weight of the skewed losses."""
    beta: Frac | None = None
    """The teacher's share in `jsd`."""
    hard_frac: Frac | None = None
    lam: Frac | None = None
    """ATKD's lambda."""
    direction: Literal["forward", "reverse"] | None = None
    params: dict[str, Any] = {}
    """Parameters of a loss of your own (`my_file:my_loss`); an error for others."""
    lm_coef: NonNegativeFloat = 0.0
    """Weight of the cross-entropy on data-set tokens that is added."""
    approximate: bool = False
    """With `teacher.output: top_logprobs`: take this loss although its error from the tail has no bound."""


class MixConfig(Section):
    """Shares of the sources of completions; they are normalised."""

    rollout: NonNegativeFloat = 0.0
    dataset: NonNegativeFloat = 0.0
    teacher: NonNegativeFloat = 0.0
    drawn: Literal["per_rollout", "per_batch"] = "per_rollout"

    @model_validator(mode="after")
    def _some(self) -> MixConfig:
        if self.rollout + self.dataset + self.teacher <= 0:
            raise ValueError("at least one of rollout, dataset, teacher must be above 0")
        return self


class HorizonConfig(Section):
    """Longest completion at a stage's step s: round(start + (end - start) min(1, s / steps)) (arXiv 2602.15260)."""

    start: PositiveInt
    end: PositiveInt
    steps: PositiveInt

    def at(self, step: int) -> int:
        return round(self.start + (self.end - self.start) * min(1.0, step / self.steps))


class StageConfig(Section):
    """A part of the run. Missing keys are taken from `rollout`, `learner` and `train` (see `loader.py`)."""

    name: Text = ""
    steps: NonNegativeInt
    batch_size: PositiveInt = 8
    mix: MixConfig = MixConfig(rollout=1.0)
    rule: RuleConfig = RuleConfig()
    loss: LossConfig = LossConfig()
    max_new_tokens: PositiveInt = 128
    horizon: HorizonConfig | None = None
    lr: PositiveFloat = 1e-5
    scheduler: Scheduler = "cosine"
    warmup_steps: NonNegativeInt = 0
    min_lr_frac: Frac = 0.0

    @property
    def needs_teacher(self) -> bool:
        return not (self.loss.type == "cross_entropy" and self.mix.rollout == 0 and self.mix.teacher == 0)


class TrainConfig(Section):
    num_steps: NonNegativeInt | None = None
    """Steps of the last stage; without stages, of the run."""
    batch_size: PositiveInt = 8
    """Rollouts of an optimizer step, over all ranks."""
    mix: MixConfig = MixConfig(rollout=1.0)
    stages: tuple[StageConfig, ...] = ()
    checkpoint_every: NonNegativeInt = 50
    """Steps; 0 = at the end only."""
    select_by: Name | None = None
    """A metric of `eval`: `student/` is then the best student of the last evaluated stage, `student-last/` the last."""
    early_stop: PositiveInt | None = None
    """End the last stage where `select_by` did not improve in so many evaluations. An earlier stage runs to its end."""


Modules = Annotated[
    Annotated[Name, Tag("<one>")] | Annotated[tuple[Name, ...], Field(min_length=1), no_repeats, Tag("<several>")],
    Discriminator(lambda value: "<several>" if isinstance(value, list | tuple) else "<one>"),
]


class LoraConfig(Section):
    r: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    dropout: Frac = 0.0
    target_modules: Modules = "all-linear"
    """`all-linear`, a list of names' ends, or a regular expression for whole names."""


class LearnerConfig(Section):
    backend: Literal["deepspeed", "fake"] = "deepspeed"
    num_ranks: PositiveInt = 1
    zero_stage: Annotated[Literal[0, 1, 2, 3], is_number] = 1
    lr: PositiveFloat = 1e-5
    scheduler: Scheduler = "cosine"
    warmup_steps: NonNegativeInt = 0
    min_lr_frac: Frac = 0.0
    loss: LossConfig = LossConfig()
    lora: LoraConfig | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    """With `bfloat16` the optimizer keeps fp32 masters. float16 would need loss scaling."""
    micro_batch_tokens: PositiveInt = 8192
    """Tokens (prompts and padding included) that one rank reads at the same time; at least one sequence."""
    gradient_checkpointing: bool = False
    grad_clip: NonNegativeFloat = 1.0
    weight_decay: NonNegativeFloat = 0.0
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    chunk_tokens: PositiveInt = 256
    """Positions whose logits exist at the same time."""
    deepspeed: Arguments = {}
    """Keys of DeepSpeed's config, which override those that switchkd sets."""
    timeout_s: PositiveSeconds = 600.0


class RolloutConfig(Section):
    rule: RuleConfig = RuleConfig()
    num_workers: Count = 1
    """A number, or `{min: 1, max: 4}`: one is added while learner and tasks wait, drained while the others suffice."""
    batch_size: PositiveInt = 8
    """Sequences that one worker generates at the same time."""
    max_new_tokens: PositiveInt = 128
    horizon: HorizonConfig | None = None
    """A shorter limit of generated completions that grows over a stage's steps: `{start: 16, end: 64, steps: 50}`."""
    samples_per_prompt: PositiveInt = 1
    max_draft_tokens: PositiveInt = 8
    """Tokens that one model drafts before the other verifies them; with drafter `auto` the largest number."""
    drafter: Literal["auto", "student", "teacher", "none"] = "auto"
    """The model that drafts. `auto` measures what is faster. Speed only: the tokens are the same."""
    overlap: bool | None = None
    """Two half-batches per worker: one drafts, the other is at the teacher. Null: on Ray with teacher GPUs."""
    on_new_weights: Literal["finish", "reprefill"] = "finish"
    save: bool = True
    """Write rollouts.jsonl."""
    save_top_logprobs: NonNegativeInt = 0
    """Number of each model's most likely tokens in rollouts.jsonl, for each token, for `switchkd report`."""
    save_teacher_output: bool = False
    """Keep trained rollouts with the teacher's output in `teacher_output/`, for `train --from-rollouts`; without it a
    checkpoint deletes them."""
    recorded: File = ""
    """A run folder with `teacher_output/`: train on its rollouts, without a teacher and rollout workers."""
    repeat_recorded: bool = False
    """Begin with the first recorded rollout again where the steps need more than there are. False: that is an error."""


class AdaptiveScheduleConfig(Section):
    """With `replay.policy: adaptive`: the share of steps that train on the student's completions (`adaptive.py`)."""

    start: Frac = 0.0
    step: Frac = 0.1
    """The share rises by this after an evaluation ..."""
    margin: NonNegativeFloat = 0.1
    """... whose `eval/loss` (nats a token) was, by this much, ..."""
    rises: Literal["worse", "no_better"] = "worse"
    """... `worse`: above that of the last rise (at first, that of the start), as in the authors' code; or `no_better`:
    not below the best one."""


class ReplayConfig(Section):
    max_staleness: NonNegativeInt = 0
    """Largest number of weight versions that a trained token may lag behind; 0 is strictly synchronous."""
    capacity: PositiveInt = 4096
    """Rollouts that wait for the learner and, with `adaptive`, that the reuse buffer holds."""
    policy: Literal["fifo", "first_finished", "adaptive"] = "fifo"
    """`fifo`: each step its own; `first_finished`: the first to finish; `adaptive` (DistiLLM): the validation loss sets
    the share of steps on the student's completions, new or from a buffer, in place of the fractions of `mix`."""
    adaptive: AdaptiveScheduleConfig = AdaptiveScheduleConfig()
    lease_s: PositiveSeconds = 3600.0


class EvalConfig(Section):
    data: File = ""
    split: Name = "validation"
    """The split of a hub name, or rows of any kind, as in `data.split`."""
    allow_test_selection: bool = False
    """Let `train.select_by` and `replay.policy: adaptive` read the split `test` of a hub name (biases its scores)."""
    every: NonNegativeInt = 0
    """Steps between evaluations during training; 0 = at stage boundaries only."""
    metrics: Annotated[tuple[Metric, ...], Field(min_length=1), no_repeats] = ("rouge_l", "agreement", "kl")
    """`loss`: cross-entropy of the references, nats a token."""
    num_prompts: PositiveInt = 200
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1), no_repeats] = (0,)
    temperature: Temperature = 1.0
    """Sampling of the scored completions; agreement and KL are also measured on the greedy ones."""
    max_new_tokens: PositiveInt = 128


class CheckpointConfig(Section):
    keep_last: PositiveInt = 2


class MetricsConfig(Section):
    log_every: PositiveInt = 1
    tensorboard: bool = False
    wandb: Name | None = None
    """A W&B project."""
    prometheus: bool = True
    """On Ray: export the numbers on every node's metrics port, as `ray_switchkd_...`."""


class FakeConfig(Section):
    """With `backend: fake`: seconds that a process's start, a forward pass and an optimizer step take."""

    start_s: Seconds = 0.0
    student_s: Seconds = 0.0
    teacher_s: Seconds = 0.0
    learner_s: Seconds = 0.0
    weights_mb: NonNegativeFloat = 1.0
    agreement: Frac = 0.75
    """Share of positions at which the models draw a common token."""


class ClusterConfig(Section):
    address: Text = ""
    """Address of a running Ray cluster (`auto`, `host:port`). Empty: the submitted job's, else a private one here."""
    wait_s: Seconds = 0.0
    """Time to wait until a cluster has the resources of the run, as it grows or other runs end."""
    object_store_gb: PositiveFloat | None = None
    """Object store of a private cluster. Null: half a gigabyte, and room for two versions of the student."""


class ResourcesConfig(Section):
    """Resources of each process of a role, as Ray counts them."""

    num_cpus: NonNegativeFloat | None = None
    """Null: 1, and on a private cluster an even share of this machine."""
    num_gpus: NonNegativeFloat = 0.0
    """All on one node: a share of one GPU (0.5), or a whole number."""
    threads: PositiveInt | None = None
    """CPU threads. Null: see `resources.py`."""
    labels: dict[Name, Text] = {}
    """Ray node labels that every process of the role requires, such as `switchkd.io/role: teacher`."""

    @field_validator("num_gpus")
    @classmethod
    def _whole(cls, value: float) -> float:
        if value > 1 and value != int(value):
            raise ValueError("above 1 it must be a whole number of GPUs")
        return value


class RoleResourcesConfig(Section):
    teacher: ResourcesConfig = ResourcesConfig()
    rollout: ResourcesConfig = ResourcesConfig()
    learner: ResourcesConfig = ResourcesConfig()
    teachers: dict[str, ResourcesConfig] = {}
    """Resources of single `teachers`, by name, instead of `teacher`."""


class Config(Section):
    format: Int = FORMAT
    seed: Seed = 0
    run: RunConfig
    teacher: TeacherConfig = TeacherConfig()
    teachers: dict[str, TeacherConfig] = {}
    """Several teachers by name: `data.teacher_field` names a prompt's one. Missing keys are taken from `teacher`."""
    student: StudentConfig = StudentConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    replay: ReplayConfig = ReplayConfig()
    learner: LearnerConfig = LearnerConfig()
    train: TrainConfig
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    resources: RoleResourcesConfig = RoleResourcesConfig()
    metrics: MetricsConfig = MetricsConfig()
    cluster: ClusterConfig = ClusterConfig()
    fake: FakeConfig = FakeConfig()

    @field_validator("format")
    @classmethod
    def _present(cls, value: int) -> int:
        if value != FORMAT:
            raise ValueError(f"this is format {FORMAT}; use the version that wrote it, or remove the key and try again")
        return value

    @property
    def is_fake(self) -> bool:
        """Whether all models are fake (`loader.py` refuses a mixture)."""
        return self.student.backend == "fake"

    @property
    def needs_teacher(self) -> bool:
        """Whether the run needs a teacher. Recorded rollouts contain its output."""
        return not self.rollout.recorded and any(stage.needs_teacher for stage in self.train.stages)

    @property
    def num_steps(self) -> int:
        return sum(stage.steps for stage in self.train.stages)

    @property
    def teacher_names(self) -> tuple[str, ...]:
        """Names of `teachers`; a single one has the name ""; none where no stage needs one."""
        return (tuple(self.teachers) or ("",)) if self.needs_teacher else ()

    def of_teacher(self, name: str) -> Config:
        """Return the config of a run with this teacher alone."""
        if name not in self.teachers:
            return self
        each = self.resources.teachers.get(name, self.resources.teacher)
        resources = self.resources.model_copy(update={"teacher": each, "teachers": {}})
        return self.model_copy(update={"teacher": self.teachers[name], "teachers": {}, "resources": resources})
