// Which charts there are. A chart takes metrics by name (`keys`: its curves, distinguished by their dashes), or a function.

const STEP = "step", POSITION = "token";
const GROUPS = [
  {
    title: "Does it learn?",
    charts: [
      { title: "Loss", keys: { "loss/total": "loss" } },
      { title: "KL on what it trains on", unit: "nats a token", keys: { "loss/kl": "KL" }, zero: true },
      { title: "Loss by writer", keys: { "loss/student": "student's tokens", "loss/teacher": "teacher's", "loss/data": "data's" } },
      { title: "Agreement with the teacher", evals: true, percent: true,
        keys: { "eval/agreement": "references", "eval/agreement_greedy": "own text" } },
      { title: "KL with the teacher, held out", unit: "nats a token", evals: true, zero: true,
        keys: { "eval/kl": "references", "eval/kl_greedy": "own text" } },
      { title: "ROUGE-L", evals: true, zero: true, keys: { "eval/rouge_l": "ROUGE-L" } },
      { title: "Exact match", evals: true, zero: true, keys: { "eval/exact_match": "exact match" } },
      { title: "Validation loss", unit: "nats a token", evals: true, keys: { "eval/loss": "references" } },
      { title: "Gradient norm", zero: true, keys: { "loss/grad_norm": "before clipping" } },
      { title: "Learning rate", zero: true, keys: { lr: "learning rate" } },
    ],
  },
  {
    title: "Who writes?",
    charts: [
      { title: "Teacher's share of completions generated together", percent: true, keys: { "rollout/teacher_token_frac": "teacher's share" } },
      { title: "Teacher's share by position", percent: true, x: POSITION, make: sharesByPosition },
      { title: "Divergence against threshold, by position", x: POSITION, zero: true, make: ruleByPosition },
      { title: "Divergence over time", zero: true, keys: { "rollout/divergence_mean": "mean" } },
      { title: "Accepted block lengths", unit: "share of blocks", x: "length", percent: true, bars: true, whole: true,
        make: (run) => (run.blockLengths.length ? [{ name: "blocks", points: run.blockLengths }] : []) },
      { title: "Mean accepted block", unit: "tokens", zero: true, keys: { "rollout/emitted_per_round": "tokens a block" } },
      { title: "Completion length", unit: "tokens", zero: true, keys: { "rollout/len_mean": "tokens" } },
      { title: "Endings and repeats", percent: true,
        keys: { "rollout/eos_frac": "ends by itself", "rollout/repeat_frac": "repeated 4-grams" } },
    ],
  },
  {
    title: "Who waits, and for whom?",
    charts: [
      { title: "Rollout speed", unit: "generated tokens/s, all workers", zero: true, keys: { "rollout/tokens_per_s": "tokens/s" } },
      { title: "Time of a step", unit: "s", zero: true, keys: { "time/step_s": "whole step", "time/learn_s": "learner's" } },
      { title: "Learner waits for rollouts", unit: "s a step", zero: true, keys: { "time/wait_rollouts_s": "waiting" } },
      { title: "Workers wait for the teacher", unit: "s a step, all workers", zero: true,
        keys: { "time/wait_teacher_s": "waiting", "time/rollout_s": "whole time at work" } },
      { title: "Workers have nothing to do", unit: "s a step, all workers", zero: true, keys: { "time/rollout_idle_s": "idle" } },
      { title: "Workers wait for room in the replay", unit: "s a step, all workers", zero: true,
        keys: { "time/wait_replay_s": "waiting" } },
      { title: "Queue", unit: "rollouts", zero: true, keys: { "replay/waiting": "finished, waiting", "rollout/in_flight": "being written" } },
      { title: "phi (DistiLLM's replay)", percent: true, keys: { "replay/phi": "phi", "replay/reused": "trained on the buffer" } },
      { title: "Staleness", unit: "versions", zero: true, keys: { "replay/staleness_mean": "mean", "replay/staleness_max": "oldest" } },
      { title: "Weight version", zero: true, keys: { weight_version: "version" } },
      { title: "From the teacher", unit: "bytes a step", zero: true, keys: { "teacher/output_bytes": "bytes" } },
      { title: "From the teacher, per token", unit: "bytes", zero: true,
        keys: { "teacher/bytes_per_token": "of a token that was kept", "teacher/bytes_per_row": "of a row that was sent" } },
      { title: "Calls to the teacher", unit: "a step", zero: true, keys: { "teacher/calls": "calls" } },
      { title: "Held in the replay", unit: "bytes", zero: true, keys: { "replay/bytes": "bytes" } },
      { title: "Top k: mass left out", percent: true, keys: { "teacher/tail_mass": "tail" } },
    ],
  },
];

function stageName(run, index) { return run.stages[index] ? run.stages[index].name : `stage ${Number(index) + 1}`; }

function sharesByPosition(run) {
  return Object.entries(run.shareByPosition).filter(([, points]) => points.length)
    .map(([stage, points], dash) => ({ name: stageName(run, stage), points, dash }));
}

function ruleByPosition(run) {
  return Object.entries(run.ruleByPosition).flatMap(([stage, { statistic, threshold }], i) => [
    { name: `${stageName(run, stage)}: divergence`, points: statistic, dash: i ? 2 : 0 },
    { name: `${stageName(run, stage)}: threshold`, points: threshold, dash: i ? 3 : 1 },
  ]);
}

function byKeys(run, spec) {
  const source = spec.evals ? run.evals : run.steps;
  return Object.entries(spec.keys).flatMap(([key, name], dash) =>
    source[key] ? [{ name, points: source[key].map(([x, y]) => [x + 1, y]), dash, dots: spec.evals }] : []);
}

function seriesOf(runs, spec) {
  const found = runs.map((run) => (spec.make ? spec.make(run) : byKeys(run, spec)));
  const one = found.every((series) => series.length < 2);
  const named = (run, name) => (runs.length === 1 ? name : one ? run.name : `${run.name}: ${name}`);
  return runs.flatMap((run, index) => found[index].map((each) => ({ ...each, run: index, name: named(run, each.name) })));
}

function drawCharts(place, runs) {
  const absent = [];
  for (const group of GROUPS) {
    const grid = html("div", { class: "grid" });
    for (const spec of group.charts) {
      const series = seriesOf(runs, spec);
      if (!series.length) { absent.push(spec.title); continue; }
      const stages = spec.x || runs.length > 1 || runs[0].stages.length < 2 ? [] : runs[0].stages.map((s) => ({ ...s, first: s.first + 1 }));
      grid.append(chart(series, { ...spec, stages, runs: runs.length, xName: spec.x || (spec.evals ? "after step" : STEP) }));
    }
    if (grid.children.length) place.append(html("h2", { class: "group" }, group.title), grid);
  }
  if (absent.length) place.append(html("p", { class: "absent" }, `Nothing was recorded for: ${absent.join(", ")}.`));
}
