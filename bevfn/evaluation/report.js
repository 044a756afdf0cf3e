// The moving parts of report.html, written into the page beside its data: charts that answer to a choice of class, and key frames
// to be browsed. Plain script: no library, so nothing to keep up to date and a page of its data's size.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const colours = data.colours, outcome = data.outcome_colours;

// ---------------------------------------------------------------------------------------------------------------- charts

function node(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function html(name, attributes = {}, ...children) {
  const made = Object.assign(document.createElement(name), attributes);
  made.append(...children);
  return made;
}

// A chart of lines [{name, colour, dash, points}] and bars [{from, to, value, colour, title, series}] in one pair of axes.
// x: [least, most, ticks, text of a tick]; log: y is a count, from 0.7 up.
function chart({ title, x, y, log = false, lines = [], bars = [], xlabel = "", grey = 0, wide = 320, high = 220 }) {
  const left = 44, bottom = 34, top = 26, right = 20;
  const [least, most, ticks, text = (v) => v] = x;
  const height = (v) => (log ? Math.log10(Math.max(v, 0.7) / 0.7) / Math.log10(Math.max(y, 2) / 0.7) : v / y);
  const px = (v) => left + ((v - least) / (most - least)) * (wide - left - right);
  const py = (v) => high - bottom - height(v) * (high - bottom - top);
  const svg = node("svg", { viewBox: `0 0 ${wide} ${high}`, role: "img", "aria-label": title });
  svg.append(node("text", { x: 4, y: 15, class: "title" }, title));
  const levels = log ? [1, 10, 100, 1e3, 1e4, 1e5, 1e6].filter((v) => v <= y) : [0, y / 4, y / 2, (3 * y) / 4, y];
  for (const v of levels) {
    svg.append(node("line", { x1: left, x2: wide - right, y1: py(v), y2: py(v), class: "grid" }));
    const shown = y > 1 ? Math.round(v).toLocaleString("en") : +v.toFixed(2);
    svg.append(node("text", { x: left - 5, y: py(v) + 4, class: "tick end" }, shown));
  }
  for (const v of ticks) svg.append(node("text", { x: px(v), y: high - bottom + 15, class: "tick middle" }, text(v)));
  svg.append(node("text", { x: (left + wide) / 2, y: high - 4, class: "tick middle" }, xlabel));
  if (grey) {
    svg.append(node("rect", { x: px(0), y: top, width: px(grey) - px(0), height: high - bottom - top, class: "grey" }));
    svg.append(node("rect", { x: left, y: py(grey), width: wide - left - right, height: py(0) - py(grey), class: "grey" }));
  }
  for (const bar of bars) {
    const drawn = { x: px(bar.from), width: Math.max(1, px(bar.to) - px(bar.from)), y: py(bar.value), fill: bar.colour };
    const of = bar.series === undefined ? {} : { "data-series": bar.series };
    svg.append(node("rect", { ...drawn, ...of, height: Math.max(0, py(0) - py(bar.value)) }, node("title", {}, bar.title)));
  }
  lines.forEach((line, series) => {
    const points = line.points.filter((p) => p[1] !== null).map((p) => `${px(p[0]).toFixed(1)},${py(p[1]).toFixed(1)}`);
    const drawn = { points: points.join(" "), stroke: line.colour, "stroke-dasharray": line.dash || "", class: "line", "data-series": series };
    svg.append(node("polyline", drawn, node("title", {}, line.name)));
    if (line.dots) for (const p of points) svg.append(node("circle", { cx: p.split(",")[0], cy: p.split(",")[1], r: 3, fill: line.colour, "data-series": series }));
  });
  return svg;
}

// Names of lines or bars; the pointer on one makes the others fade, a click takes it away.
function legend(names, host) {
  return html("div", { className: "legend" }, ...names.map(([name, colour, dash], i) => {
    const swatch = node("svg", { viewBox: "0 0 26 8" }, node("line", { x1: 0, x2: 26, y1: 4, y2: 4, stroke: colour, "stroke-dasharray": dash || "", "stroke-width": 3 }));
    const button = html("button", { type: "button" }, swatch, name);
    const each = (act) => host.querySelectorAll("[data-series]").forEach((drawn) => act(drawn, +drawn.dataset.series === i));
    button.onpointerenter = () => each((drawn, own) => drawn.classList.toggle("faint", !own));
    button.onpointerleave = () => each((drawn) => drawn.classList.remove("faint"));
    button.onclick = () => {
      const hidden = button.classList.toggle("off");
      each((drawn, own) => { if (own) drawn.style.display = hidden ? "none" : ""; });
    };
    return button;
  }));
}

const dashes = ["", "7 3", "2 3", "9 3 2 3"];

function precisionRecall() {
  const host = at("pr"), k = +at("pr-distance").value;
  const shown = data.scores.filter((c) => c.annotated);
  const lines = shown.map((c, i) => {
    const curve = c.precision[k], end = curve.findLastIndex((p) => p > 0);
    return { name: `${c.name}: AP ${c.ap_at[k].toFixed(3)}`, colour: colours[data.classes.indexOf(c.name) % colours.length],
      dash: dashes[i % 4], points: curve.slice(0, end + 1).map((p, r) => [r / 100, p]) };
  });
  const title = `precision over recall, matched within ${data.distances[k]} m`;
  const svg = chart({ title, x: [0, 1, [0, 0.25, 0.5, 0.75, 1]], y: 1, lines, xlabel: "recall", grey: 0.1, wide: 760, high: 400 });
  host.replaceChildren(svg, legend(lines.map((line) => [line.name, line.colour, line.dash]), svg));
}

function slices(name) {
  const [recall, ap] = [data.series[0], data.series[1]];
  const charts = Object.entries(data.breakdown.slices).map(([what, of]) => {
    const parts = of[name], bars = [], alone = parts.every((part) => part.AP === null);
    parts.forEach((part, i) => [["recall", recall, alone ? 0.31 : 0.1], ["AP", ap, 0.5]].forEach(([key, colour, from], series) => {
      if (part[key] !== null) bars.push({ from: i + from, to: i + from + 0.38, value: part[key], colour, series,
        title: `${what} ${part.part}: ${key} ${part[key].toFixed(3)}, ${part.found} of ${part.annotated} found` });
    }));
    const ticks = parts.map((_, i) => i + 0.5);
    return chart({ title: `by ${what}`, x: [0, Math.max(1, parts.length), ticks, (v) => parts[v - 0.5].part], y: 1, bars });
  });
  at("slices").replaceChildren(...charts, legend([["recall from the threshold on", recall], ["AP at 2 m", ap]], at("slices")));
}

function scores(name) {
  const c = data.breakdown.calibration[name], n = c.hits.length;
  const steps = (values) => values.flatMap((v, i) => [[i / n, v], [(i + 1) / n, v]]);
  const most = Math.max(...c.hits, ...c.false_alarms, 1), x = [0, 1, [0, 0.25, 0.5, 0.75, 1]];
  const lines = [{ name: "found a box", colour: outcome.found, points: steps(c.hits) },
    { name: "false alarm", colour: outcome.false_alarm, dash: "7 3", points: steps(c.false_alarms) }];
  const apart = c.error === null ? "no detections" : `mean distance ${c.error.toFixed(3)}`;
  const trusted = [{ name: "score = share", colour: "var(--muted)", dash: "2 3", points: [[0, 0], [1, 1]] },
    { name: "share that found a box", colour: data.series[0], dots: true, points: c.share.map((v, i) => [c.score[i], v]) }];
  const first = chart({ title: "detections by score (counts, logarithmic)", x, y: most, log: true, lines, xlabel: "score", wide: 480, high: 270 });
  const second = chart({ title: `calibration: ${apart}`, x, y: 1, lines: trusted, xlabel: "mean score", wide: 480, high: 270 });
  const both = [[first, lines], [second, trusted]].map(([svg, of]) =>
    html("div", {}, svg, legend(of.map((line) => [line.name, line.colour, line.dash]), svg)));
  at("scores").replaceChildren(...both);
}

function errors(name) {
  const charts = Object.entries(data.breakdown.errors[name]).map(([what, e]) => {
    const bars = e.counts.map((v, i) => ({ from: e.edges[i], to: e.edges[i + 1], value: v, colour: data.series[0],
      title: `${e.edges[i].toFixed(2)} to ${e.edges[i + 1].toFixed(2)}: ${v}` }));
    const last = e.edges.at(-1), ticks = [0, 0.25, 0.5, 0.75, 1].map((share) => share * last);
    const middle = e.median === null ? "none known" : `median ${e.median.toFixed(2)}, 90 % ${e.p90.toFixed(2)}`;
    return chart({ title: `${what}: ${middle}`, x: [0, last, ticks, (v) => v.toFixed(2)], y: Math.max(1, ...e.counts), bars });
  });
  at("errors").replaceChildren(...charts);
}

function byClass() {
  const name = at("class").value;
  slices(name), scores(name), errors(name);
}

function sortable(table) {
  table.querySelectorAll("thead th").forEach((head, column) => (head.onclick = () => {
    const rows = [...table.tBodies[0].rows], up = (head.dataset.up = head.dataset.up === "1" ? "" : "1");
    const value = (row) => { const text = row.cells[column].textContent; return text === "-" ? -1 : isNaN(text.replaceAll(",", "")) ? text : +text.replaceAll(",", ""); };
    rows.sort((a, b) => (value(a) < value(b) ? -1 : 1) * (up ? 1 : -1));
    table.tBodies[0].append(...rows);
  }));
}

// ------------------------------------------------------------------------------------------------------------ key frames

const EDGES = [[0, 1], [1, 2], [2, 3], [3, 0], [4, 5], [5, 6], [6, 7], [7, 4], [0, 4], [1, 5], [2, 6], [3, 7]];
const view = { frame: 0, turn: 0, tilt: Math.PI / 2, zoom: 1 };

function corners([, x, y, z, l, w, h, yaw]) {
  const c = Math.cos(yaw), s = Math.sin(yaw);
  return [-1, 1].flatMap((k) => [[1, 1], [-1, 1], [-1, -1], [1, -1]].map(([i, j]) =>
    [x + (c * i * l - s * j * w) / 2, y + (s * i * l + c * j * w) / 2, z + (k * h) / 2]));
}

// What is shown of a frame under the filters: [box, colour, dashed, width].
function shown(frame) {
  const least = +at("least").value, wanted = at("frame-class").value, on = (id) => at(id).checked, made = [];
  const fits = (box) => wanted === "" || data.classes[box[0]] === wanted;
  for (const box of frame.known.filter(fits)) {
    const by = box[10];
    if (by === -2) { if (on("show-others")) made.push([box, outcome.not_counted, true, 1]); }
    else if (by >= least) { if (on("show-found")) made.push([box, outcome.found, true, 1.6]); }
    else if (on("show-missed")) made.push([box, outcome.missed, true, 2.4]);
  }
  for (const box of frame.detected.filter((box) => fits(box) && box[10] >= least)) {
    if (box[11] ? on("show-hits") : on("show-alarms")) made.push([box, box[11] ? outcome.hit : outcome.false_alarm, false, 1.6]);
  }
  return made;
}

// Lines between points, each through `place`, which gives [u, v, depth]; behind the camera they are cut.
function stroke(context, pairs, place, near) {
  context.beginPath();
  for (const [a, b] of pairs) {
    let [p, q] = [place(a), place(b)];
    if (p[2] < q[2]) [p, q] = [q, p];
    if (p[2] <= near) continue;
    if (q[2] < near) { const t = (near - q[2]) / (p[2] - q[2]); q = q.map((v, i) => v + (p[i] - v) * t); }
    const [u, v] = near > -1e9 ? [[p[0] / p[2], p[1] / p[2]], [q[0] / q[2], q[1] / q[2]]] : [p, q];
    context.moveTo(u[0], u[1]);
    context.lineTo(v[0], v[1]);
  }
  context.stroke();
}

function boxLines(box) {
  const corner = corners(box), [, x, y, z, l, , h, yaw, vx, vy] = box;
  const floor = z - h / 2, nose = [x + (Math.cos(yaw) * l) / 2, y + (Math.sin(yaw) * l) / 2, floor];
  const pairs = EDGES.map(([i, j]) => [corner[i], corner[j]]);
  pairs.push([nose, [nose[0] + Math.cos(yaw), nose[1] + Math.sin(yaw), floor]]); // which way it faces
  return [pairs, Math.hypot(vx, vy) < 0.3 ? [] : arrow([x, y, floor], [x + vx, y + vy, floor])];
}

function arrow(from, to) { // where it is in a second
  const back = Math.atan2(to[1] - from[1], to[0] - from[0]), barb = (turn) => [to[0] - Math.cos(back + turn), to[1] - Math.sin(back + turn), to[2]];
  return [[from, to], [to, barb(0.45)], [to, barb(-0.45)]];
}

function above(frame, boxes) {
  const canvas = at("above"), context = canvas.getContext("2d"), size = canvas.width, scale = (size / 2 / data.range) * view.zoom;
  const [ct, st, ce, se] = [Math.cos(view.turn), Math.sin(view.turn), Math.cos(view.tilt), Math.sin(view.tilt)];
  const place = ([x, y, z]) => [size / 2 + (x * ct - y * st) * scale, size / 2 - ((x * st + y * ct) * se + z * ce) * scale, 1];
  context.fillStyle = "#fff";
  context.fillRect(0, 0, size, size);
  context.strokeStyle = "#e3e7ed";
  for (let radius = 10; radius < 1.5 * data.range; radius += 10) {
    const ring = [...Array(61).keys()].map((i) => [radius * Math.cos((i * Math.PI) / 30), radius * Math.sin((i * Math.PI) / 30), 0]);
    stroke(context, ring.slice(1).map((p, i) => [ring[i], p]), place, -Infinity);
  }
  for (const p of frame.cloud) {
    const [u, v] = place(p), grey = Math.round(Math.max(60, Math.min(200, 190 - (p[2] + 2) * 35)));
    context.fillStyle = `rgb(${grey},${grey},${grey})`;
    context.fillRect(u, v, 1.6, 1.6);
  }
  for (const [box, colour, dashed, width] of boxes) {
    const [pairs, velocity] = boxLines(box);
    context.strokeStyle = colour, context.lineWidth = width, context.setLineDash(dashed ? [5, 3] : []);
    stroke(context, pairs, place, -Infinity);
    context.setLineDash([]);
    stroke(context, velocity, place, -Infinity);
  }
  context.lineWidth = 1.5, context.strokeStyle = "#1c2430";
  stroke(context, arrow([0, -1.5, 0], [0, 1.5, 0]), place, -Infinity); // our own vehicle
}

function camera(one, boxes) {
  const canvas = html("canvas", { width: one.size[0], height: one.size[1] }), context = canvas.getContext("2d"), m = one.matrix;
  const place = ([x, y, z]) => [0, 4, 8].map((r) => m[r] * x + m[r + 1] * y + m[r + 2] * z + m[r + 3]);
  const picture = new Image();
  picture.onload = () => {
    context.drawImage(picture, 0, 0);
    for (const [box, colour, dashed, width] of boxes) {
      const [pairs, velocity] = boxLines(box);
      context.strokeStyle = colour, context.lineWidth = width * 0.8, context.setLineDash(dashed ? [4, 2] : []);
      if (place(box.slice(1, 4))[2] > 0.1) stroke(context, [...pairs, ...velocity], place, 0.1);
    }
  };
  picture.src = one.image;
  return html("figure", {}, canvas, html("figcaption", {}, one.name));
}

function decoded(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0)), values = new DataView(bytes.buffer), points = [];
  for (let i = 0; i + 5 < bytes.length; i += 6) points.push([0, 2, 4].map((k) => values.getInt16(i + k, true) / 100));
  return points;
}

function browse(cameras = true) {
  const frame = data.frames[view.frame], boxes = shown(frame), least = +at("least").value;
  frame.cloud ??= decoded(frame.points);
  at("frame").value = view.frame;
  at("least-shown").textContent = least.toFixed(2);
  const counted = frame.known.filter((box) => box[10] > -2), sure = frame.detected.filter((box) => box[10] >= least);
  at("frame-text").textContent = `${frame.scene || "scene unknown"}, key frame ${frame.token}: ${counted.filter((b) => b[10] >= least).length} of `
    + `${counted.length} found, ${sure.filter((b) => !b[11]).length} false alarms from score ${least.toFixed(2)} on`;
  above(frame, boxes);
  if (cameras) at("cameras").replaceChildren(...frame.cameras.map((one) => camera(one, boxes)));
  at("cameras").style.setProperty("--columns", Math.max(1, Math.ceil(frame.cameras.length / 2)));
}

function moved(event) {
  if (!event.buttons) return;
  view.turn += event.movementX * 0.01;
  view.tilt = Math.max(0.15, Math.min(Math.PI / 2, view.tilt + event.movementY * 0.01));
  browse(false);
}

// ------------------------------------------------------------------------------------------------------------------ start

precisionRecall();
at("pr-distance").onchange = precisionRecall;
document.querySelectorAll("table.sortable").forEach(sortable);
if (data.breakdown) {
  byClass();
  at("class").onchange = byClass;
}
if (data.frames.length) {
  const step = (by) => () => { view.frame = (view.frame + by + data.frames.length) % data.frames.length; browse(); };
  at("previous").onclick = step(-1);
  at("next").onclick = step(1);
  at("frame").onchange = () => { view.frame = +at("frame").value; browse(); };
  at("upright").onclick = () => { Object.assign(view, { turn: 0, tilt: Math.PI / 2, zoom: 1 }); browse(false); };
  for (const id of ["least", "frame-class", "show-found", "show-missed", "show-hits", "show-alarms", "show-others"]) at(id).oninput = () => browse();
  at("above").onpointermove = moved;
  at("above").onpointerdown = (event) => at("above").setPointerCapture(event.pointerId);
  at("above").onwheel = (event) => { event.preventDefault(); view.zoom = Math.max(0.5, Math.min(8, view.zoom * Math.exp(-event.deltaY * 0.001))); browse(false); };
  browse();
}
