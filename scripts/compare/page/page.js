// Draws the curves of the page from the data inside it. One crosshair, one zoom, for all charts.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const state = { x: "tokens", hidden: new Set(), zoom: null };
const charts = [];
const DASHES = ["", "7 4", "2 3", "9 3 2 3"];

function element(parent, name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

function ticks(low, high, wanted) {
  const raw = (high - low) / wanted;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= raw * 0.999);
  const found = [];
  for (let n = Math.ceil(low / step); n * step <= high * (1 + 1e-9); n++) found.push(n * step);
  return found;
}

function short(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  for (const [unit, letter] of [[1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
    if (size >= unit * (letter === "k" ? 10 : 1)) return `${+(value / unit).toPrecision(4)}${letter}`;
  }
  return `${+value.toPrecision(4)}`;
}

function exact(value, unit) {
  const size = Math.abs(value);
  const digits = size >= 1000 ? 0 : size >= 10 ? 2 : 4;
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }) + unit;
}

// The points of one curve inside the zoom, as [x, y]; a gap in the data (null) breaks the line.
function points(run, chart) {
  const xs = run[state.x];
  return chart.series[run.index].map((y, i) => [xs[i], y])
    .filter(([x, y]) => x !== null && y !== undefined && inZoom(x));
}
function inZoom(x) {
  return !state.zoom || (x >= state.zoom[0] && x <= state.zoom[1]);
}
function visible(chart) {
  return data.runs.filter((run) => !state.hidden.has(run.index) && chart.series[run.index].some((y) => y !== null));
}

class Chart {
  constructor(figure, spec) {
    Object.assign(this, spec);
    this.figure = figure;
    this.svg = element(figure, "svg", { class: "plot", tabindex: 0, role: "img", "aria-label": `${spec.title}: use the arrow keys to read values` });
    this.tip = document.createElement("div");
    this.tip.className = "tip";
    this.tip.hidden = true;
    figure.append(this.tip);
    this.svg.addEventListener("pointermove", (event) => this.move(event));
    this.svg.addEventListener("pointerdown", (event) => this.press(event));
    this.svg.addEventListener("pointerup", (event) => this.release(event));
    this.svg.addEventListener("pointerleave", () => this.leave());
    this.svg.addEventListener("dblclick", () => zoom(null));
    this.svg.addEventListener("keydown", (event) => this.key(event));
    this.svg.addEventListener("blur", () => crosshair(null));
    new ResizeObserver(() => this.draw()).observe(figure);
  }

  draw() {
    const { svg } = this;
    const width = svg.clientWidth, height = svg.clientHeight;
    if (!width) return;
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const runs = visible(this);
    const all = runs.flatMap((run) => points(run, this).concat(this.dotsOf(run)));
    const ys = all.map(([, y]) => y).filter((y) => y !== null);
    if (!ys.length) {
      this.box = null;
      element(svg, "text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "nothing to show");
      return;
    }
    let low = Math.min(...ys), high = Math.max(...ys);
    if (this.zero) { low = Math.min(low, 0); high = Math.max(high, 0); }
    const pad = (high - low || Math.abs(high) || 1) * 0.06;
    low -= pad; high += pad;
    const xs = all.map(([x]) => x);
    const box = { left: 52, right: width - 10, top: 10, bottom: height - 34, low, high, x0: Math.min(...xs), x1: Math.max(...xs) };
    if (box.x0 === box.x1) { box.x0 -= 1; box.x1 += 1; }
    this.box = box;
    for (const value of ticks(low, high, 5)) {
      const y = this.y(value);
      element(svg, "line", { class: this.zero && Math.abs(value) < 1e-12 ? "zero" : "grid", x1: box.left, x2: box.right, y1: y, y2: y });
      element(svg, "text", { x: box.left - 6, y: y + 4, "text-anchor": "end" }, short(+value.toPrecision(10)));
    }
    for (const value of ticks(box.x0, box.x1, width < 420 ? 4 : 6)) {
      element(svg, "text", { x: this.x(value), y: box.bottom + 16, "text-anchor": "middle" }, short(value));
    }
    element(svg, "text", { x: box.right, y: height - 3, "text-anchor": "end" }, state.x);
    for (const run of runs) this.curve(run);
    this.overlay = element(svg, "g", {});
  }

  curve(run) {
    let path = "", pen = false;
    for (const [x, y] of points(run, this)) {
      if (y === null) { pen = false; continue; }
      path += `${pen ? "L" : "M"}${this.x(x).toFixed(1)} ${this.y(y).toFixed(1)}`;
      pen = true;
    }
    // A curve that another one covers exactly is wide and pale, so that both can be seen.
    element(this.svg, "path", {
      class: "curve", "data-run": run.name, d: path, fill: "none", stroke: `var(--${run.path})`,
      "stroke-width": run.under ? 5 : 1.8, "stroke-opacity": run.under ? 0.45 : 1,
      "stroke-dasharray": DASHES[run.repeat % DASHES.length], "stroke-linejoin": "round",
    });
    for (const [x, y] of this.dotsOf(run)) {
      if (y !== null) element(this.svg, "circle", { cx: this.x(x), cy: this.y(y), r: 3.5, fill: `var(--${run.path})` });
    }
  }

  dotsOf(run) {
    const xs = run[state.x];
    return ((this.dots || [])[run.index] || []).map((y, i) => [xs[i], y]).filter(([x, y]) => y !== null && x !== null && inZoom(x));
  }

  x(value) { const b = this.box; return b.left + ((value - b.x0) / (b.x1 - b.x0)) * (b.right - b.left); }
  y(value) { const b = this.box; return b.bottom - ((value - b.low) / (b.high - b.low)) * (b.bottom - b.top); }
  at(event) {
    const b = this.box, rect = this.svg.getBoundingClientRect();
    const share = (event.clientX - rect.left - b.left) / (b.right - b.left);
    return b.x0 + Math.min(1, Math.max(0, share)) * (b.x1 - b.x0);
  }

  move(event) {
    if (!this.box) return;
    const x = this.at(event);
    crosshair(x, this);
    if (this.from !== undefined && this.overlay) {
      const [a, b] = [this.x(this.from), this.x(x)].sort((p, q) => p - q);
      element(this.overlay, "rect", { class: "brush", x: a, width: b - a, y: this.box.top, height: this.box.bottom - this.box.top });
    }
  }
  press(event) {
    // A finger scrolls and reads; zooming by drag is for a mouse or pen.
    if (this.box && event.pointerType !== "touch") this.from = this.at(event);
    else this.move(event);
  }
  release(event) {
    const from = this.from;
    this.from = undefined;
    if (from === undefined || !this.box) return;
    const range = [from, this.at(event)].sort((p, q) => p - q);
    if (range[1] - range[0] > (this.box.x1 - this.box.x0) * 0.02) zoom(range);
  }
  leave() { this.from = undefined; crosshair(null); }

  key(event) {
    if (!this.box || !["ArrowLeft", "ArrowRight", "Escape"].includes(event.key)) return;
    event.preventDefault();
    if (event.key === "Escape") return zoom(null);
    const xs = [...new Set(visible(this).flatMap((run) => points(run, this).map(([x]) => x)))].sort((a, b) => a - b);
    const here = state.cross === undefined ? -1 : xs.indexOf(xs.reduce((a, b) => Math.abs(b - state.cross) < Math.abs(a - state.cross) ? b : a));
    const next = here + (event.key === "ArrowRight" ? 1 : -1);
    crosshair(xs[Math.min(xs.length - 1, Math.max(0, next))], this);
  }

  // The crosshair at the logged step nearest to x, and in the chart under the pointer the values.
  show(x, withTip) {
    if (!this.box || !this.overlay) return;
    this.overlay.replaceChildren();
    this.tip.hidden = true;
    if (x === null) return;
    const rows = [];
    let where = null;
    for (const run of visible(this)) {
      const near = points(run, this).filter(([, y]) => y !== null)
        .reduce((best, point) => !best || Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best, null);
      if (!near) continue;
      if (where === null || Math.abs(near[0] - x) < Math.abs(where - x)) where = near[0];
      rows.push([run, near]);
    }
    if (where === null) return;
    element(this.overlay, "line", { class: "cross", x1: this.x(where), x2: this.x(where), y1: this.box.top, y2: this.box.bottom });
    const here = rows.filter(([, near]) => near[0] === where);
    for (const [run, near] of here) element(this.overlay, "circle", { cx: this.x(near[0]), cy: this.y(near[1]), r: 4, fill: `var(--${run.path})` });
    if (!withTip) return;
    this.tip.replaceChildren();
    const head = document.createElement("b");
    head.textContent = `${state.x === "tokens" ? "" : "step "}${where.toLocaleString("en")}${state.x === "tokens" ? " tokens" : ""}`;
    this.tip.append(head);
    for (const [run, near] of here) {
      const row = document.createElement("div"), name = document.createElement("span"), value = document.createElement("span");
      const swatch = document.createElement("i");
      swatch.className = "swatch";
      swatch.style.background = `var(--${run.path})`;
      name.append(swatch, run.name);
      value.textContent = exact(near[1], this.unit);
      row.append(name, value);
      this.tip.append(row);
    }
    this.tip.hidden = false;
    const middle = this.x(where), width = this.tip.offsetWidth, room = this.svg.clientWidth;
    const left = middle + 14 + width > room ? middle - 14 - width : middle + 14;
    this.tip.style.left = `${Math.max(0, Math.min(left, room - width))}px`;
    this.tip.style.top = `${this.svg.offsetTop + 14}px`;
  }
}

function crosshair(x, owner) {
  state.cross = x === null ? undefined : x;
  for (const chart of charts) chart.show(x, chart === owner);
}
function redraw() {
  for (const chart of charts) chart.draw();
  document.getElementById("reset").disabled = !state.zoom;
}
function zoom(range) { state.zoom = range; crosshair(null); redraw(); }

function button(parent, label, pressed, act) {
  const made = document.createElement("button");
  made.type = "button";
  if (pressed !== null) made.setAttribute("aria-pressed", pressed);
  made.append(...label);
  made.addEventListener("click", () => act(made));
  parent.append(made);
  return made;
}

const legend = document.getElementById("legend");
for (const run of data.runs) {
  const swatch = document.createElement("i");
  swatch.className = "swatch";
  swatch.style.background = `var(--${run.path})`;
  button(legend, [swatch, run.name], true, (made) => {
    const shown = state.hidden.has(run.index);
    state.hidden[shown ? "delete" : "add"](run.index);
    made.setAttribute("aria-pressed", shown);
    redraw();
  });
}
const tools = document.getElementById("tools");
button(tools, ["x axis: tokens"], null, (made) => {
  state.x = state.x === "tokens" ? "step" : "tokens";
  made.textContent = `x axis: ${state.x === "step" ? "steps" : "tokens"}`;
  zoom(null);
});
button(tools, ["reset zoom"], null, () => zoom(null)).id = "reset";
for (const spec of data.charts) {
  const figure = document.createElement("figure");
  figure.className = "chart";
  const caption = document.createElement("figcaption");
  caption.textContent = spec.title;
  figure.append(caption);
  document.getElementById("charts").append(figure);
  charts.push(new Chart(figure, spec));
}
redraw();
