"use strict";

/** The ends of an axis: of what is drawn, and a margin. */
function axisEnds(values, log, whole) {
  const shown = values.filter((v) => v !== null && (!log || v > 0));
  if (shown.length === 0) return log ? [1, 10] : [0, 1];
  let [low, high] = [Infinity, -Infinity];
  for (const v of shown) { low = Math.min(low, v); high = Math.max(high, v); }
  if (log) {
    const wider = whole ? 1 : Math.max((high / low) ** 0.06, 1.05);
    return [low / wider, high * wider];
  }
  const wider = whole && high > low ? 0 : Math.max(0.06 * (high - low), 1e-6 * Math.abs(high), 1e-12);
  return [low - wider, high + wider];
}

/** Round values within the ends, about `count` of them, each with its label; where labels would be
    the same, as of a constant, one in the middle. */
function ticks([low, high], log, count) {
  const found = rounds([low, high], log, count).map((v) => [v, format(v)]);
  if (new Set(found.map(([, text]) => text)).size === found.length) return found;
  const middle = (low + high) / 2;
  return [[middle, format(middle)]];
}

function rounds([low, high], log, count) {
  if (log && high / low > 5) {
    const decades = Math.log10(high / low);
    const factors = decades < count / 2 ? [1, 2, 5] : [1];
    const step = Math.max(1, Math.ceil(decades / count));
    const found = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e += 1) {
      if (e % step) continue;
      for (const factor of factors) found.push(factor * 10 ** e);
    }
    return found.filter((v) => v >= low * (1 - 1e-9) && v <= high * (1 + 1e-9));
  }
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((a) => a * power).find((s) => s >= rough);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k += 1) {
    found.push(Number((k * step).toPrecision(12)));
  }
  return found;
}

/**
 * Curves in a figure, as SVG.
 *
 * host: a figure. about: {name, xLabel, logX, logY, hover}. The chart is drawn by `show(series)`,
 * each {name, colour, dash, x, y, step, dots} with x increasing, and again when the figure's width
 * changes; `mark(x)` puts a dot with the value on each curve; with hover, the pointer does.
 */
function chart(host, about) {
  let series = [], marked = null, scale = null, width = 0;
  const height = 230, left = 58, right = 16, top = 40, bottom = 42;
  const svg = element("svg:svg", { role: "img", "aria-label": about.name });
  const marks = element("svg:g");
  const tip = element("div", { class: "tip", hidden: "" });
  host.classList.add("chart");
  host.replaceChildren(svg, tip);

  /** From values to places on the axis, and back. */
  const along = (ends, log, from, to) => {
    const [f, inverse] = log ? [Math.log, Math.exp] : [(v) => v, (v) => v];
    const [a, b] = ends.map(f);
    return [(v) => from + ((f(v) - a) / (b - a)) * (to - from),
      (place) => inverse(a + ((place - from) / (to - from)) * (b - a))];
  };

  function draw() {
    width = Math.max(240, host.clientWidth);
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("height", height);
    const all = (key) => series.flatMap((s) => s[key]);
    // Without a positive value there is no logarithm to draw.
    const logX = about.logX && all("x").some((v) => v > 0);
    const logY = about.logY && all("y").some((v) => v > 0);
    const xEnds = axisEnds(all("x"), logX, true), yEnds = axisEnds(all("y"), logY, false);
    const [x, xAt] = along(xEnds, logX, left, width - right);
    const [y] = along(yEnds, logY, height - bottom, top);
    scale = { x, y, xAt, shown: (a, b) => a !== null && b !== null && (!logX || a > 0) && (!logY || b > 0) };
    const parts = [label(left, 16, about.name, "start", 600)];
    for (const [v, text] of ticks(xEnds, logX, Math.max(2, Math.floor(width / 75)))) {
      parts.push(label(x(v), height - bottom + 17, text, "middle"), grid(x(v), x(v), top, height - bottom));
    }
    for (const [v, text] of ticks(yEnds, logY, 5)) {
      parts.push(label(left - 7, y(v) + 4, text, "end"), grid(left, width - right, y(v), y(v)));
    }
    parts.push(label(width - right, height - 6, about.xLabel, "end"));
    svg.replaceChildren(...parts, ...series.flatMap(curve), marks);
    mark(marked);
  }

  const label = (x, y, text, anchor, weight = 400) =>
    element("svg:text", { x, y, "text-anchor": anchor, "font-weight": weight }, text);
  const grid = (x1, x2, y1, y2) => element("svg:line", { x1, x2, y1, y2, class: "grid" });
  const dot = (x, y, colour, r) => {
    const made = element("svg:circle", { cx: x, cy: y, r });
    made.style.fill = colour;
    return made;
  };

  function curve(s) {
    let path = "", before = null;
    const dots = [];
    s.x.forEach((a, k) => {
      if (!scale.shown(a, s.y[k])) { before = null; return; }
      const [px, py] = [scale.x(a).toFixed(1), scale.y(s.y[k]).toFixed(1)];
      path += before === null ? `M${px} ${py}` : s.step ? `H${px}V${py}` : `L${px} ${py}`;
      before = py;
      if (s.dots || s.x.length === 1) dots.push(dot(px, py, s.colour, 2.5));
    });
    const line = element("svg:path", { d: path || "M0 0" });
    line.style.stroke = s.colour;
    line.style.strokeDasharray = s.dash ?? "none";
    return [line, ...dots];
  }

  /** The index of the last value known by x; -1 before the first. */
  const last = (s, x) => {
    let low = -1, high = s.x.length;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (s.x[middle] <= x) low = middle; else high = middle;
    }
    return low;
  };

  function mark(at) {
    marked = at;
    if (at === null || scale === null) return marks.replaceChildren();
    const parts = [];
    for (const s of series) {
      const k = last(s, at);
      if (k < 0 || !scale.shown(at, s.y[k])) continue;
      const [px, py] = [scale.x(at), scale.y(s.y[k])];
      const end = px > width - 80;
      parts.push(dot(px, py, about.hover ? s.colour : "var(--c1)", 5));
      if (!about.hover) parts.push(label(px + (end ? -9 : 9), py - 8, format(s.y[k]), end ? "end" : "start", 600));
    }
    marks.replaceChildren(...parts);
  }

  /** Under the pointer: the value of each curve there, or the last before. */
  function point(event) {
    const box = svg.getBoundingClientRect();
    const px = ((event.clientX - box.left) / box.width) * width;
    const at = scale.xAt(Math.min(width - right, Math.max(left, px)));
    const found = series.map((s) => [s, last(s, at)]).filter(([, k]) => k >= 0);
    mark(at);
    tip.textContent = [`${about.xLabel} ${format(at)}`,
      ...found.map(([s, k]) => `${s.name}: ${format(s.y[k], 6)}`)].join("\n");
    tip.hidden = found.length === 0;
    tip.style.top = `${top + 4}px`;
    [tip.style.left, tip.style.right] = px > width / 2 ? [`${left + 4}px`, "auto"] : ["auto", `${right}px`];
  }
  if (about.hover) {
    svg.addEventListener("pointermove", point);
    svg.addEventListener("pointerleave", () => { tip.hidden = true; mark(null); });
  }

  new ResizeObserver(() => { if (Math.max(240, host.clientWidth) !== width) draw(); }).observe(host);
  return { show(curves) { series = curves; draw(); }, mark };
}
