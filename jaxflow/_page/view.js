"use strict";

const EVERY = 1000; // milliseconds between two questions
const RECENT = 15; // seconds for which a log counts as being written
// Those that a thin line shows on both grounds, and dashes for more runs than that.
const CURVES = ["var(--c0)", "var(--c1)", "var(--c2)", "var(--c3)", "var(--c6)"];
const DASHES = ["none", "7 3", "2 3"];

const runs = pageData().map((about, k) => ({
  ...about, k, shown: true, state: {}, metrics: null, film: null,
  colour: CURVES[k % CURVES.length], dash: DASHES[Math.floor(k / CURVES.length) % DASHES.length],
}));
const charts = new Map(); // by metric and axis

async function ask(path) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error(`${answer.status}`);
  return answer.json();
}

/** One question: what has changed is drawn again. */
async function poll() {
  const states = await ask("state");
  const changed = runs.filter((run, k) => states[k].version !== run.metrics?.version);
  states.forEach((state, k) => { runs[k].state = state; });
  await Promise.all(changed.map(async (run) => { run.metrics = await ask(`metrics/${run.k}`); }));
  showRuns();
  runs.forEach(showFilm);
  if (changed.length > 0) showMetrics();
  byId("status").textContent = `${runs.length} run${runs.length > 1 ? "s" : ""}, watched while this page is open.`;
  return states.some((state) => state.more);
}

async function watch() {
  let wait = EVERY;
  try {
    wait = (await poll()) ? 0 : EVERY;
  } catch (error) {
    byId("status").textContent = "The server does not answer: what is shown is the last that it told.";
  }
  setTimeout(watch, wait);
}

// ------------------------------------------------------------------ runs

/** What is known of a log, in words. */
function told({ state, metrics, error }) {
  const lines = metrics?.lines ?? 0;
  const parts = [lines === 0 ? "no metrics yet" : `${lines} line${lines > 1 ? "s" : ""} of metrics`];
  if (state.more) parts.push(`${Math.round(100 * state.read)} % read`);
  if (state.age !== null && state.age !== undefined) {
    parts.push(state.age < RECENT ? "being written" : `last written ${ago(state.age)} ago`);
  }
  const bad = [error, state.error];
  if (metrics?.damaged) bad.push(`${metrics.damaged} damaged line${metrics.damaged > 1 ? "s" : ""}: ${metrics.told.join("; ")}`);
  return [parts.join(", "), bad.filter(Boolean).join(" ")];
}

function ago(seconds) {
  const units = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
  const [size, name] = units.find(([size]) => seconds >= size) ?? units[3];
  return `${Math.round(seconds / size)} ${name}`;
}

function makeRuns() {
  byId("runs").append(...runs.map((run) => {
    const box = element("input", { type: "checkbox", checked: "" });
    box.addEventListener("change", () => { run.shown = box.checked; showMetrics(); showFilm(run); });
    const swatch = element("svg:svg", { class: "swatch", viewBox: "0 0 28 8", "aria-hidden": "true" });
    swatch.append(element("svg:path", { d: "M0 4H28" }));
    [swatch.style.stroke, swatch.style.strokeDasharray] = [run.colour, run.dash];
    run.cell = element("td");
    return element("tr", {},
      element("th", { scope: "row" }, element("label", {}, box, swatch, run.name)),
      element("td", {}, run.command), run.cell);
  }));
}

function showRuns() {
  for (const run of runs) {
    const [state, bad] = told(run);
    if (run.cell.textContent === `${state}${bad}`) continue;
    run.cell.replaceChildren(state, ...(bad ? [element("div", { class: "fail" }, bad)] : []));
  }
}

/** The tokens in motion, if there are any, and again where they were written again. */
function showFilm(run) {
  const version = run.shown ? run.state.film ?? null : null;
  if (version === run.film) return;
  run.film = version;
  run.figure?.remove();
  if (version === null) return;
  const frame = element("iframe", {
    src: `film/${run.k}`, title: `Simulation of ${run.name}`, sandbox: "allow-scripts", loading: "lazy",
  });
  run.figure = element("figure", {}, element("figcaption", {}, element("h2", {}, run.name)), frame);
  const next = runs.slice(run.k + 1).find((other) => other.figure?.isConnected);
  byId("films").insertBefore(run.figure, next?.figure ?? null);
}

// ------------------------------------------------------------------ metrics

/** The axis of a run on the chosen clock, or null where it has none. */
function axis(run) {
  const clock = byId("clock").value;
  return clock === "own" ? run.metrics.axis : clock;
}

function showMetrics() {
  const shown = runs.filter((run) => run.shown && run.metrics?.axis);
  const clock = byId("clock").value;
  const wanted = new Map();
  for (const run of shown) {
    for (const [name, curve] of Object.entries(run.metrics.curves)) {
      if (curve[clock] === undefined || curve[clock].every((x) => x === null)) continue;
      const key = JSON.stringify([name, axis(run)]);
      if (!wanted.has(key)) wanted.set(key, []);
      wanted.get(key).push({ name: run.name, colour: run.colour, dash: run.dash, x: curve[clock], y: curve.y });
    }
  }
  for (const [key, made] of charts) {
    if (wanted.has(key)) continue;
    made.host.remove();
    charts.delete(key);
  }
  for (const [key, series] of wanted) {
    if (!charts.has(key)) charts.set(key, makeChart(...JSON.parse(key)));
    charts.get(key).drawn.show(series);
  }
  showLast(shown);
}

function makeChart(name, over) {
  const host = byId("charts").appendChild(element("figure"));
  const words = (text) => text.replaceAll("_", " ");
  const about = { name: words(name), xLabel: words(over), logX: false, logY: byId("log").checked, hover: true };
  return { host, drawn: chart(host, about) };
}

/** A table, of text alone: a row of cells each, the first of them its head. */
function fill(table, head, rows) {
  const cells = (row, name, first) => row.map((cell, k) =>
    k === 0 ? element("th", { scope: first }, cell) : element(name, {}, cell));
  table.replaceChildren(
    element("thead", {}, element("tr", {}, ...cells(head, "th", "col"))),
    element("tbody", {}, ...rows.map((row) => element("tr", {}, ...cells(row, "td", "row")))),
  );
}

function showLast(shown) {
  const names = [...new Set(shown.flatMap((run) => Object.keys(run.metrics.last)))];
  fill(byId("last"), ["", ...shown.map((run) => run.name)],
    names.map((name) => [name, ...shown.map((run) => format(run.metrics.last[name], 6))]));
}

/** The settings of one run, or those that differ between several. */
function showSettings() {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.settings)))].sort();
  const rows = names.map((name) => [name, ...runs.map((run) => run.settings[name] ?? "–")]);
  const several = runs.length > 1;
  const told = several ? rows.filter((row) => row.slice(2).some((value) => value !== row[1])) : rows;
  byId("settings-title").textContent = several ? "Settings that differ" : "Settings";
  fill(byId("settings"), ["", ...runs.map((run) => run.name)], told);
}

function anew() {
  for (const made of charts.values()) made.host.remove();
  charts.clear();
  showMetrics();
}

const TALLEST = 2400; // pixels, whatever a film says

/** A film says how tall it is: its frame is no less. */
addEventListener("message", ({ source, data }) => {
  const frame = runs.map((run) => run.figure?.querySelector("iframe")).find((f) => f?.contentWindow === source);
  if (!frame || !(data?.height > frame.clientHeight)) return;
  frame.style.height = `${Math.min(Math.ceil(data.height) + 2, TALLEST)}px`;
});

byId("clock").addEventListener("change", anew);
byId("log").addEventListener("change", anew);
makeRuns();
showSettings();
watch();
