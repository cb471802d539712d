// The rollout viewer: a list that can be filtered, the chosen completion token by token, and a card about one token.

const WRITERS = { student: "the student", teacher: "the teacher", data: "the data set" };

function spread(runs, num) {
  const out = [];
  for (const [value, count] of runs || []) for (let i = 0; i < count && out.length < num; i += 1) out.push(value);
  return out;
}

class Viewer {
  constructor(place, runs) {
    this.place = place;
    this.runs = runs;
    this.card = html("div", { class: "card", role: "status", hidden: "" });
    this.list = html("div", { class: "list panel", role: "listbox", "aria-label": "Rollouts", tabindex: "0" });
    this.panel = html("div", { class: "panel", "aria-live": "off" });
    this.count = html("p", { class: "about", role: "status" });
    place.append(html("h2", { class: "group" }, "Rollouts"), this.filters(), this.legend(), this.keys(), this.count);
    place.append(html("div", { class: "view" }, this.list, this.panel), this.card);
    this.list.addEventListener("keydown", (event) => this.onListKey(event));
    this.list.addEventListener("click", (event) => {
      const option = event.target.closest("[role=option]");
      if (option) this.choose(Number(option.dataset.place));
    });
    document.addEventListener("keydown", (event) => {
      if (event.key === "/" && !/INPUT|SELECT|TEXTAREA/.test(event.target.tagName)) { event.preventDefault(); this.search.focus(); }
    });
    this.filter();
  }

  get run() { return this.runs[Number(this.which.value)]; }

  // ── filters ──

  filters() {
    const input = (name, attributes, tag = "input", ...inside) => {
      const made = html(tag, attributes, ...inside);
      made.setAttribute("aria-label", name);
      made.addEventListener("input", () => this.filter());
      return [made, html("label", {}, name, made)];
    };
    const choices = (values) => values.map(([value, name]) => html("option", { value }, name));
    const [which, whichLabel] = input("run", {}, "select", ...choices(this.runs.map((run, i) => [i, run.name])));
    const [search, searchLabel] = input("prompt or text contains", { type: "search" });
    const [from, fromLabel] = input("from step", { type: "number", min: 1, step: 1 });
    const [to, toLabel] = input("to step", { type: "number", min: 1, step: 1 });
    const [least, leastLabel] = input("teacher ≥ %", { type: "number", min: 0, max: 100, step: 5 });
    const [most, mostLabel] = input("teacher ≤ %", { type: "number", min: 0, max: 100, step: 5 });
    const [origin, originLabel] = input("written as", {}, "select",
      ...choices([["", "anything"], ["rollout", "rollout"], ["dataset", "data set"], ["teacher", "teacher alone"]]));
    const [order, orderLabel] = input("order", {}, "select",
      ...choices([["step", "step"], ["-step", "latest first"], ["-share", "most teacher"], ["share", "least teacher"], ["-num", "longest"]]));
    const clear = html("button", { type: "button" }, "Clear");
    clear.addEventListener("click", () => {
      for (const one of [search, from, to, least, most, origin]) one.value = "";
      order.value = "step";
      this.filter();
    });
    if (this.runs.some((run) => run.rollouts.some((one) => one.origin === "rollout"))) origin.value = "rollout";
    Object.assign(this, { which, search, from, to, least, most, origin, order });
    if (this.runs.length < 2) whichLabel.hidden = true;
    return html("fieldset", { class: "filters", "aria-label": "Filter" },
      whichLabel, searchLabel, fromLabel, toLabel, leastLabel, mostLabel, originLabel, orderLabel, clear);
  }

  legend() {
    const sample = (kind, text) => html("span", {}, html("span", { class: `tok ${kind}` }, ` ${kind} `), ` ${text}`);
    return html("div", { class: "legend", "aria-label": "Legend" },
      sample("student", "plain"), sample("teacher", "underlined"), sample("data", "dotted"));
  }

  keys() {
    const key = (name) => html("kbd", {}, name);
    return html("p", { class: "keys" }, key("/"), " search · in the list ", key("↑"), " ", key("↓"), " choose, ", key("Enter"),
      " into the text · in the text ", key("←"), " ", key("→"), " token by token, ", key("t"), " next token of the teacher, ",
      key("Esc"), " back to the list");
  }

  filter() {
    const words = this.search.value.toLowerCase();
    const limit = (input, otherwise) => (input.value === "" ? otherwise : Number(input.value));
    const [from, to] = [limit(this.from, -Infinity), limit(this.to, Infinity)];
    const [least, most] = [limit(this.least, -Infinity) / 100, limit(this.most, Infinity) / 100];
    const key = this.order.value.replace("-", ""), sign = this.order.value.startsWith("-") ? -1 : 1;
    this.shown = this.run.rollouts
      .filter((one) => one.step + 1 >= from && one.step + 1 <= to && one.share >= least && one.share <= most)
      .filter((one) => !this.origin.value || one.origin === this.origin.value)
      .filter((one) => !words || one.prompt.toLowerCase().includes(words) || one.pieces.join("").toLowerCase().includes(words))
      .sort((a, b) => sign * (a[key] - b[key]) || a.step - b.step || a.id - b.id);
    const embedded = this.run.rollouts.length;
    const more = embedded < this.run.numRollouts ? ` on this page, an even sample of the run's ${this.run.numRollouts}` : "";
    this.count.textContent = embedded ? `${this.shown.length} of ${embedded} rollouts${more}.` : "";
    this.list.replaceChildren(...this.shown.map((one, place) => this.option(one, place)));
    if (!this.shown.length) {
      this.list.append(html("p", { class: "none" }, embedded ? "No rollout fits." : "No rollouts were recorded."));
      this.panel.replaceChildren(html("p", { class: "none" }, "Nothing to show."));
      this.list.removeAttribute("aria-activedescendant");
      this.hideCard();
    } else this.choose(0);
  }

  option(one, place) {
    const bar = html("span", { class: one.origin === "dataset" ? "share data" : "share" }, html("i"));
    bar.firstChild.style.width = `${100 * one.share}%`;
    const about = `step ${one.step + 1} · ${one.origin === "dataset" ? "data set" : `teacher ${Math.round(100 * one.share)}%`} · ${one.num} tokens`;
    return html("div", { role: "option", id: `rollout-${place}`, "data-place": place, "aria-selected": "false" },
      html("span", { class: "what" }, lastWords(one.prompt)), html("span", { class: "where" }, about), bar);
  }

  choose(place) {
    this.at = place;
    for (const option of this.list.children) option.setAttribute("aria-selected", String(Number(option.dataset.place) === place));
    const option = this.list.children[place];
    this.list.setAttribute("aria-activedescendant", option.id);
    const box = option.getBoundingClientRect(), view = this.list.getBoundingClientRect();
    // not scrollIntoView, which scrolls the page too, also when it opens
    this.list.scrollTop += Math.min(0, box.top - view.top) + Math.max(0, box.bottom - view.bottom);
    this.show(this.shown[place]);
  }

  onListKey(event) {
    const move = { ArrowDown: this.at + 1, ArrowUp: this.at - 1, PageDown: this.at + 8, PageUp: this.at - 8, Home: 0, End: Infinity }[event.key];
    if (move !== undefined && this.shown.length) {
      event.preventDefault();
      this.choose(Math.max(0, Math.min(move, this.shown.length - 1)));
    } else if (event.key === "Enter") {
      event.preventDefault();
      const first = this.panel.querySelector(".tok[tabindex='0']");
      if (first) first.focus();
    }
  }

  // ── one rollout ──

  show(one) {
    this.hideCard();
    this.panel.replaceChildren(
      html("h3", {}, `Rollout ${one.id}`),
      html("p", { class: "about" }, aboutRollout(this.run, one)),
      html("pre", { class: "prompt", tabindex: "0", "aria-label": "Prompt" }, one.prompt),
      ...this.completion(one), this.others(one));
    if (!this.panel.lastChild.children.length) this.panel.lastChild.remove();
    const prompt = this.panel.querySelector(".prompt");
    prompt.scrollTop = prompt.scrollHeight;
  }

  completion(one) {
    const writers = spread(one.sources, one.pieces.length), versions = spread(one.versions, one.pieces.length);
    const tokens = html("div", { class: "tokens", role: "group", "aria-label": "Completion, token by token" });
    one.pieces.forEach((piece, i) => {
      const token = html("span", { class: `tok ${writers[i]}`, tabindex: i ? "-1" : "0", "data-i": i });
      token.append(...visible(piece));
      tokens.append(token);
    });
    const strip = this.strip(one, writers);
    const look = (i) => {
      for (const token of tokens.querySelectorAll(".here")) token.classList.remove("here");
      if (strip) strip.point(i);
      if (i === null) { this.hideCard(); return; }
      const token = tokens.children[i];
      token.classList.add("here");
      this.showCard(one, i, writers[i], versions[i], token);
    };
    const placed = (event) => { const found = event.target.closest && event.target.closest(".tok"); return found ? Number(found.dataset.i) : null; };
    tokens.addEventListener("pointerover", (event) => { const i = placed(event); if (i !== null) look(i); });
    tokens.addEventListener("pointerleave", () => { if (!tokens.contains(document.activeElement)) look(null); });
    tokens.addEventListener("focusin", (event) => look(placed(event)));
    tokens.addEventListener("focusout", (event) => { if (!tokens.contains(event.relatedTarget)) look(null); });
    tokens.addEventListener("click", (event) => { const i = placed(event); if (i !== null) focusToken(tokens, i); });
    tokens.addEventListener("keydown", (event) => this.onTokenKey(event, tokens, writers));
    if (strip) strip.onPick((i) => focusToken(tokens, i), look);
    return strip ? [tokens, ...strip.parts] : [tokens];
  }

  onTokenKey(event, tokens, writers) {
    const at = Number(document.activeElement.dataset.i), last = tokens.children.length - 1;
    if (event.key === "Escape") { this.list.focus(); return; }
    const next = (from, step) => { for (let i = from + step; i >= 0 && i <= last; i += step) if (writers[i] === "teacher") return i; return at; };
    const move = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: last, t: next(at, 1), T: next(at, -1) }[event.key];
    const line = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (move === undefined && line === undefined) return;
    event.preventDefault();
    focusToken(tokens, line === undefined ? Math.max(0, Math.min(move, last)) : nearestInLine(tokens, at, line));
  }

  strip(one, writers) {
    if (!one.statistic || !one.statistic.some((value) => value !== null)) return null;
    const W = 1000, H = 74, num = one.pieces.length, width = W / num;
    const finite = [...one.statistic, ...(one.threshold || [])].filter((value) => value !== null);
    const top = Math.max(...finite, 1e-9) * 1.08;
    const Y = (value) => H - 2 - (Math.max(value, 0) / top) * (H - 6);
    const drawing = svg("svg", { class: "strip", viewBox: `0 0 ${W} ${H}`, preserveAspectRatio: "none", "aria-hidden": "true" });
    one.statistic.forEach((value, i) => {
      if (value !== null) drawing.append(svg("rect", {
        class: `bar-${writers[i]}`, x: i * width + width * 0.1, width: width * 0.8, y: Y(value), height: Math.max(H - 2 - Y(value), 1) }));
    });
    let path = "";
    (one.threshold || []).forEach((value, i) => {
      if (value !== null && one.statistic[i] !== null) path += `${path && one.statistic[i - 1] !== null ? "L" : "M"}${i * width} ${Y(value)}L${(i + 1) * width} ${Y(value)}`;
    });
    drawing.append(svg("path", { class: "limit", d: path, "vector-effect": "non-scaling-stroke" }));
    const here = svg("rect", { class: "here-line", y: 1, height: H - 2, width, fill: "none", "vector-effect": "non-scaling-stroke", visibility: "hidden" });
    drawing.append(here);
    const place = (event) => {
      const box = drawing.getBoundingClientRect();
      return Math.max(0, Math.min(num - 1, Math.floor(((event.clientX - box.left) / box.width) * num)));
    };
    return {
      parts: [html("p", { class: "strip-name" }, "Divergence of each token, coloured by writer, and the threshold (dashed)"), drawing],
      point: (i) => { here.setAttribute("visibility", i === null ? "hidden" : "visible"); if (i !== null) here.setAttribute("x", i * width); },
      onPick: (pick, look) => {
        drawing.addEventListener("click", (event) => pick(place(event)));
        drawing.addEventListener("pointermove", (event) => look(place(event)));
        drawing.addEventListener("pointerleave", () => look(null));
      },
    };
  }

  others(one) {
    const out = html("div", { class: "others" });
    for (const run of this.runs) {
      if (run === this.run) continue;
      const same = run.rollouts.filter((other) => other.prompt === one.prompt)
        .sort((a, b) => Math.abs(a.step - one.step) - Math.abs(b.step - one.step))[0];
      if (same) out.append(html("h4", {}, `The same prompt in ${run.name}`), html("p", { class: "about" }, aboutRollout(run, same)), ...this.completion(same));
    }
    return out;
  }

  // ── one token ──

  hideCard() { this.card.hidden = true; }

  showCard(one, i, writer, version, token) {
    const lines = [html("h5", {}, `${i + 1}. `, html("code", {}, quoted(one.pieces[i])), ` by ${WRITERS[writer] || writer}`)];
    if (!one.versions) lines[0] = html("h5", {}, html("code", {}, quoted(one.pieces[i])), ` by ${WRITERS[writer] || writer}`);
    const seen = one.statistic ? one.statistic[i] : null, limit = one.threshold ? one.threshold[i] : null;
    if (seen !== null) lines.push(html("p", {}, `divergence ${number(seen)} ${limit === null ? "" : `${seen > limit ? ">" : "≤"} threshold ${number(limit)}`}`));
    else if (one.versions) lines.push(html("p", {}, writer === "data" ? "the data set wrote it, no rule looked" : "the rule did not look here"));
    const unsure = one.uncertainty ? one.uncertainty[i] : null;
    if (unsure !== null) lines.push(html("p", {}, `the teacher's probability of it: ${number(1 - unsure)}`));
    if (version !== undefined) lines.push(html("p", {}, `student's weights: version ${version}`));
    if (one.candidates) lines.push(html("div", { class: "pair" }, this.side(one, "teacher", i), this.side(one, "student", i)));
    else if (one.versions) lines.push(html("p", { class: "where" }, "Candidates: rollout.save_top_logprobs=3 records them."));
    this.card.replaceChildren(...lines);
    this.card.hidden = false;
    this.settle(token);
  }

  side(one, name, i) {
    const side = one.candidates[name];
    const out = html("div", {}, html("b", {}, `${name} would write`));
    (side.ids[i] || []).forEach((id, k) => {
      const taken = one.ids && one.ids[i] === id;
      out.append(html("div", { class: taken ? "cand taken" : "cand" }, html("code", {}, quoted(side.texts[i][k])),
        html("span", {}, `${(100 * Math.exp(side.logprobs[i][k])).toFixed(1)}%`)));
    });
    if (!(side.ids[i] || []).length) out.append(html("div", { class: "where" }, "did not read this token"));
    return out;
  }

  settle(token) {
    this.card.style.left = this.card.style.top = "";
    if (getComputedStyle(this.card).position === "fixed") return;
    const box = token.getBoundingClientRect(), width = this.card.offsetWidth, height = this.card.offsetHeight;
    const left = Math.max(8, Math.min(box.left, document.documentElement.clientWidth - width - 12));
    const above = box.top - height - 8 > 0 && box.bottom + height + 12 > window.innerHeight;
    this.card.style.left = `${left + window.scrollX}px`;
    this.card.style.top = `${(above ? box.top - height - 8 : box.bottom + 8) + window.scrollY}px`;
  }
}

function focusToken(tokens, i) {
  for (const token of tokens.querySelectorAll("[tabindex='0']")) token.tabIndex = -1;
  tokens.children[i].tabIndex = 0;
  tokens.children[i].focus();
}

function nearestInLine(tokens, at, direction) {
  const from = tokens.children[at].getBoundingClientRect();
  let best = at, line = null;
  for (let i = at + direction; i >= 0 && i < tokens.children.length; i += direction) {
    const box = tokens.children[i].getBoundingClientRect();
    if (Math.abs(box.top - from.top) < 4) continue;
    if (line === null) line = box.top;
    if (Math.abs(box.top - line) > 4) break;
    if (best === at || Math.abs(box.left - from.left) < Math.abs(tokens.children[best].getBoundingClientRect().left - from.left)) best = i;
  }
  return best;
}

function visible(piece) {
  if (piece === "") return [html("span", { class: "mark", title: "part of the next character" }, "◦")];
  return piece.split(/(\n)/).filter((part) => part !== "").flatMap((part) => (part === "\n" ? [html("span", { class: "mark" }, "↵"), "\n"] : [part]));
}

function quoted(piece) { return piece === "" ? "part of a character" : JSON.stringify(piece).slice(1, -1).replace(/^ | $/g, "␣").replace(/\\"/g, '"'); }

function lastWords(prompt) {
  const plain = prompt.replace(/<\|[^|<>]*\|>/g, "\n").split("\n").map((line) => line.trim()).filter((line) => line && !/^(system|user|assistant)$/.test(line));
  const text = plain[plain.length - 1] || prompt;
  return text.length > 160 ? `…${text.slice(-160)}` : text;
}

function aboutRollout(run, one) {
  const parts = [`step ${one.step + 1}`, stageName(run, one.stage), `prompt ${one.promptId}`, `${one.num} tokens`];
  parts.push(one.origin === "dataset" ? "from the data set" : `${Math.round(1000 * one.share) / 10}% by the teacher`);
  parts.push(one.ends === "eos" ? "ended by itself" : "cut at its length");
  if (one.blocks.length) parts.push(`${one.blocks.length} blocks of ${number(one.blocks.reduce((a, b) => a + b, 0) / one.blocks.length)} tokens`);
  if (one.approximate) parts.push("approximate");
  return parts.join(" · ");
}
