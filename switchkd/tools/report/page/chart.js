"use strict";
// One chart: curves or bars in an SVG, with a crosshair that follows the pointer or the arrow keys.
// Nothing from a run ever becomes markup: texts are set as texts.

const SVG = "http://www.w3.org/2000/svg";
const DASHES = ["", "6 4", "2 3", "9 3 2 3"];

function svg(name, attributes = {}, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function html(name, attributes = {}, ...inside) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") made.className = value;
    else if (value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...inside.filter((part) => part !== null && part !== undefined && part !== ""));
  return made;
}

function number(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1e12) return (value / 1e12).toPrecision(3) + "T";
  if (size >= 1e9) return (value / 1e9).toPrecision(3) + "G";
  if (size >= 1e6) return (value / 1e6).toPrecision(3) + "M";
  if (size >= 1e4) return (value / 1e3).toPrecision(3) + "k";
  if (size !== 0 && size < 1e-3) return value.toExponential(1);
  return String(Number(value.toPrecision(3)));
}

function ticks(low, high, count) {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((n) => n * power).find((s) => s >= raw);
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-6; at += step) found.push(Number(at.toPrecision(12)));
  return found;
}

// series: [{name, points: [[x, y]], run, dash, dots}]; options: {title, unit, xName, percent, zero, bars, stages}
function chart(series, options) {
  const W = 420, H = 210, L = 46, R = 10, T = 14, B = 26;
  const all = series.flatMap((one) => one.points);
  const xs = all.map((point) => point[0]), ys = all.map((point) => point[1]);
  let [x0, x1] = [Math.min(...xs), Math.max(...xs)], [y0, y1] = [Math.min(...ys), Math.max(...ys)];
  if (options.bars) { x0 -= 0.5; x1 += 0.5; }
  if (x0 === x1) { x0 -= 0.5; x1 += 0.5; }
  if (options.zero && y0 > 0) y0 = 0;
  if (options.percent) { y0 = 0; y1 = Math.min(1, Math.max(y1 * 1.05, 0.05)); }
  if (y0 === y1 && options.zero && y0 === 0) y1 = 1;
  if (y0 === y1) { y0 -= Math.abs(y0) * 0.1 || 0.5; y1 += Math.abs(y1) * 0.1 || 0.5; }
  const show = options.percent ? (v) => number(v * 100) + "%" : number;
  const X = (x) => L + ((x - x0) / (x1 - x0)) * (W - L - R), Y = (y) => H - B - ((y - y0) / (y1 - y0)) * (H - T - B);

  const last = series.map((one) => `${one.name}: last ${show(one.points[one.points.length - 1][1])}`).join("; ");
  const drawing = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", tabindex: "0", "aria-label": `${options.title}. ${last}` });
  for (const y of ticks(y0, y1, 4)) {
    drawing.append(svg("line", { class: "gridline", x1: L, x2: W - R, y1: Y(y), y2: Y(y) }));
    drawing.append(svg("text", { class: "tick", x: L - 6, y: Y(y) + 4, "text-anchor": "end" }, show(y)));
  }
  for (const x of ticks(x0, x1, 5)) {
    if (options.whole && x !== Math.round(x)) continue;
    drawing.append(svg("text", { class: "tick", x: X(x), y: H - B + 15, "text-anchor": "middle" }, number(x)));
  }
  drawing.append(svg("line", { class: "axis", x1: L, x2: W - R, y1: H - B, y2: H - B }));
  for (const stage of options.stages || []) {
    if (stage.first < x0 || stage.first >= x1) continue;
    if (stage.first > x0) drawing.append(svg("line", { class: "stage", x1: X(stage.first), x2: X(stage.first), y1: T, y2: H - B }));
    drawing.append(svg("text", { class: "stage-name", x: X(Math.max(stage.first, x0)) + 3, y: T - 3 }, stage.name));
  }
  series.forEach((one, place) => {
    const color = `var(--run-${one.run % 6})`;
    if (options.bars) {
      const width = ((W - L - R) / (x1 - x0)) * (0.8 / options.runs);
      for (const [x, y] of one.points) {
        const left = X(x - 0.4) + place * width;
        const bar = svg("rect", { x: left, y: Y(y), width: Math.max(width - 1, 1), height: Math.max(Y(y0) - Y(y), 0.5) });
        bar.style.fill = color;
        drawing.append(bar);
      }
      return;
    }
    const path = svg("path", {
      class: "curve", "stroke-dasharray": DASHES[one.dash || 0],
      d: one.points.map(([x, y], i) => `${i ? "L" : "M"}${X(x).toFixed(1)} ${Y(y).toFixed(1)}`).join(""),
    });
    path.style.stroke = color;
    drawing.append(path);
    if (one.dots || one.points.length < 3) for (const [x, y] of one.points) {
      const dot = svg("circle", { cx: X(x), cy: Y(y), r: 3 });
      dot.style.fill = color;
      drawing.append(dot);
    }
  });
  const cross = svg("line", { class: "cross", y1: T, y2: H - B, visibility: "hidden" });
  drawing.append(cross);

  const tip = html("div", { class: "tip", hidden: "" });
  const key = html("div", { class: "key" });
  if (series.length > 1 || options.alwaysKey) for (const one of series) key.append(html("span", {}, sample(one), one.name));
  const unit = options.unit ? html("span", { class: "unit" }, options.unit) : "";
  const figure = html("figure", { class: "chart", "data-title": options.title }, html("figcaption", {}, options.title, unit), drawing, key, tip);

  const places = [...new Set(xs)].sort((a, b) => a - b);
  let at = -1;
  const point = (index) => {
    at = Math.max(0, Math.min(index, places.length - 1));
    const x = places[at];
    const lines = series.map((one) => [one.name, one.points.find((p) => p[0] === x)]).filter(([, found]) => found);
    tip.replaceChildren(html("div", {}, `${options.xName} ${number(x)}`));
    for (const [name, [, y]] of lines) tip.append(html("div", {}, `${series.length > 1 ? name + ": " : ""}${show(y)}`));
    tip.hidden = false;
    cross.setAttribute("visibility", "visible");
    cross.setAttribute("x1", X(x)); cross.setAttribute("x2", X(x));
    const box = drawing.getBoundingClientRect(), left = drawing.offsetLeft ?? 0;
    const px = (X(x) / W) * box.width;
    const width = tip.offsetWidth;
    tip.style.left = `${Math.max(4, px + 20 + width > box.width ? px - width - 2 : px + 22)}px`;
    tip.style.top = "40px";
  };
  const leave = () => { tip.hidden = true; cross.setAttribute("visibility", "hidden"); };
  drawing.addEventListener("pointermove", (event) => {
    const box = drawing.getBoundingClientRect();
    const x = x0 + (((event.clientX - box.left) / box.width) * W - L) / (W - L - R) * (x1 - x0);
    let best = 0;
    places.forEach((place, i) => { if (Math.abs(place - x) < Math.abs(places[best] - x)) best = i; });
    point(best);
  });
  drawing.addEventListener("pointerleave", leave);
  drawing.addEventListener("blur", leave);
  drawing.addEventListener("keydown", (event) => {
    const move = { ArrowRight: at + 1, ArrowLeft: at < 0 ? places.length - 1 : at - 1, Home: 0, End: places.length - 1 }[event.key];
    if (event.key === "Escape") leave();
    if (move === undefined) return;
    event.preventDefault();
    point(move);
  });
  return figure;
}

function sample(one) {
  const drawn = svg("svg", { viewBox: "0 0 26 8", "aria-hidden": "true" });
  const line = svg("line", { x1: 1, x2: 25, y1: 4, y2: 4, "stroke-width": 2.4, "stroke-dasharray": DASHES[one.dash || 0] });
  line.style.stroke = `var(--run-${one.run % 6})`;
  drawn.append(line);
  return drawn;
}
