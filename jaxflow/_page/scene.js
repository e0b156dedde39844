"use strict";

const COLOURS = 8, SHAPES = 5; // cluster c: colour c mod 8, shape c / 8 mod 5

/** From coordinates to pixels. Three of them are turned, and seen from far away. */
function camera(film) {
  const view = { yaw: -0.75, pitch: 0.45, zoom: 1 };
  const solid = film.shape[1] === 3;
  const project = (window, width, height) => {
    const middle = window.map(([low, high]) => (low + high) / 2);
    const half = window.map(([low, high]) => (high - low) / 2);
    if (!solid) {
      const room = [(width - 70) / 2, (height - 60) / 2];
      const scale = film.radius === null ? room.map((r, a) => r / half[a])
        : Array(2).fill(Math.min(...room) / Math.max(...half));
      return (x, y) => [width / 2 + 15 + scale[0] * (x - middle[0]),
        height / 2 - 12 - scale[1] * (y - middle[1]), 0];
    }
    // A cube holds the window; the sphere fills it, a box of other sides has to turn in sight.
    const fill = film.radius === null ? 0.56 : 0.92;
    const scale = (view.zoom * fill * Math.min(width, height)) / 2;
    const [s, c] = [Math.sin(view.yaw), Math.cos(view.yaw)];
    const [u, v] = [Math.sin(view.pitch), Math.cos(view.pitch)];
    return (x, y, z) => {
      const [p, q, r] = [(x - middle[0]) / half[0], (y - middle[1]) / half[1], (z - middle[2]) / half[2]];
      const ahead = c * p + s * q;
      return [width / 2 + scale * (c * q - s * p), height / 2 - scale * (v * r - u * ahead), v * ahead + u * r];
    };
  };
  return { view, solid, project };
}

/** Draws markers of each colour and shape once, and stamps them. */
function stamps(ratio, radius) {
  const style = getComputedStyle(document.documentElement);
  const edge = style.getPropertyValue("--text");
  const made = new Map();
  return (cluster) => {
    if (!made.has(cluster)) {
      const colour = style.getPropertyValue(`--c${cluster < 0 ? COLOURS : cluster % COLOURS}`);
      made.set(cluster, stamp(ratio * radius, colour, edge, Math.floor(Math.max(cluster, 0) / COLOURS) % SHAPES));
    }
    return made.get(cluster);
  };
}

function stamp(r, colour, edge, shape) {
  const canvas = element("canvas", { width: Math.ceil(2 * r + 4), height: Math.ceil(2 * r + 4) });
  const pen = canvas.getContext("2d");
  pen.translate(canvas.width / 2, canvas.height / 2);
  const turned = shape === 1 || shape === 4 ? Math.PI / 4 : 0;
  pen.rotate(turned);
  pen.beginPath();
  if (shape === 0) pen.arc(0, 0, r, 0, 2 * Math.PI);
  else if (shape < 3) pen.rect(-0.8 * r, -0.8 * r, 1.6 * r, 1.6 * r);
  else { // a cross, of two bars
    const [long, wide] = [r, 0.36 * r];
    [[wide, long], [wide, wide], [long, wide], [long, -wide], [wide, -wide], [wide, -long],
      [-wide, -long], [-wide, -wide], [-long, -wide], [-long, wide], [-wide, wide], [-wide, long]]
      .forEach(([x, y]) => pen.lineTo(x, y));
    pen.closePath();
  }
  pen.fillStyle = colour;
  pen.fill();
  pen.globalAlpha = 0.45;
  pen.lineWidth = Math.max(0.6, r / 8);
  pen.strokeStyle = edge;
  pen.stroke();
  return canvas;
}

/** The picture of the tokens. `draw(position)` paints it, `token(x, y)` is the one under a place. */
function scene(film, points) {
  const canvas = byId("tokens"), pen = canvas.getContext("2d");
  const { view, solid, project } = camera(film);
  const at = placer(film, points);
  const [n, k] = film.shape;
  const shown = new Float32Array(3 * n); // x, y, depth
  let ratio = 1, marker = null;

  function fit() {
    ratio = Math.min(window.devicePixelRatio || 1, 2);
    canvas.width = Math.round(canvas.clientWidth * ratio);
    canvas.height = Math.round(canvas.clientHeight * ratio);
    const size = (solid ? 4.2 : 4.8) * (n > 1500 ? 0.7 : 1);
    marker = stamps(ratio, size);
  }

  function draw(position) {
    const [place, window] = at(position);
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    const seen = project(window, width, height);
    const style = getComputedStyle(canvas);
    pen.font = "13px system-ui, sans-serif";
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    for (let j = 0; j < n; j += 1) {
      shown.set(seen(place[j * k], place[j * k + 1], solid ? place[j * k + 2] : 0), 3 * j);
    }
    if (solid && film.radius !== null) {
      wires(seen, style, false);
      tokens((depth) => depth < 0);
      veil(width, height, style);
      wires(seen, style, true);
      names(seen, style);
      tokens((depth) => depth >= 0);
    } else {
      wires(seen, style, true);
      if (film.radius === null) axes(seen, window, style); else names(seen, style);
      tokens(() => true);
    }
  }

  /** Tokens whose depth is asked for. */
  function tokens(asked) {
    pen.setTransform(1, 0, 0, 1, 0, 0);
    for (let j = 0; j < n; j += 1) {
      if (!asked(shown[3 * j + 2])) continue;
      const image = marker(film.clusters[j]);
      pen.drawImage(image, ratio * shown[3 * j] - image.width / 2, ratio * shown[3 * j + 1] - image.height / 2);
    }
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  }

  /** What dims the far side of the sphere. */
  function veil(width, height, style) {
    if (film.hollow) return;
    pen.globalAlpha = 0.62;
    pen.fillStyle = style.getPropertyValue("--ground");
    pen.beginPath();
    pen.arc(width / 2, height / 2, (view.zoom * 0.9 * Math.min(width, height)) / 2, 0, 2 * Math.PI);
    pen.fill();
    pen.globalAlpha = 1;
  }

  /** The meridians and parallels of one side. */
  function wires(seen, style, near) {
    pen.strokeStyle = style.getPropertyValue("--line");
    pen.lineWidth = 1;
    pen.beginPath();
    for (const line of film.wires) {
      let pair = null;
      for (const point of line) {
        const [x, y, depth] = seen(...point);
        if (pair !== null && (depth >= 0) === near) { pen.moveTo(...pair); pen.lineTo(x, y); }
        pair = [x, y];
      }
    }
    pen.stroke();
  }

  /** The coordinates, where their axes leave the sphere or the circle. */
  function names(seen, style) {
    pen.fillStyle = style.getPropertyValue("--soft");
    pen.textAlign = "center";
    film.names.forEach((name, a) => {
      const [x, y] = seen(...film.names.map((_, b) => (a === b ? 1.09 * film.radius : 0)));
      pen.fillText(name, x, y + 4);
    });
  }

  /** Axes, with the ends of their window. */
  function axes(seen, window, style) {
    pen.strokeStyle = style.getPropertyValue("--line");
    pen.fillStyle = style.getPropertyValue("--text");
    pen.lineWidth = 1;
    const line = (a, b) => { pen.beginPath(); pen.moveTo(a[0], a[1]); pen.lineTo(b[0], b[1]); pen.stroke(); };
    const write = (text, [x, y], align) => { pen.textAlign = align; pen.fillText(text, x, y); };
    if (solid) return box(seen, window, line, write);
    const corner = window.map(([low]) => low);
    const [left, bottom] = seen(...corner), [end, top] = seen(...window.map(([, high]) => high));
    line([left, bottom], [end, bottom]);
    line([left, bottom], [left, top]);
    for (const [v, text] of ticks(window[0], false, 4)) write(text, [seen(v, corner[1])[0], bottom + 16], "center");
    for (const [v, text] of ticks(window[1], false, 4)) write(text, [left - 6, seen(corner[0], v)[1] + 4], "right");
    write(film.names[0], [end, bottom + 32], "right");
    write(film.names[1], [left, top - 8], "center");
  }

  function box(seen, window, line, write) {
    const corner = (bits) => window.map((ends, a) => ends[(bits >> a) & 1]);
    for (let bits = 0; bits < 8; bits += 1) {
      for (const a of [0, 1, 2]) {
        if (bits & (1 << a)) continue;
        line(seen(...corner(bits)), seen(...corner(bits | (1 << a))));
      }
    }
    for (const a of [0, 1, 2]) {
      const end = corner(1 << a), start = corner(0);
      write(`${film.names[a]} = ${format(window[a][1], 3)}`, seen(...end), "center");
      if (a === 0) write(window.map(([low]) => format(low, 3)).join(", "), seen(...start), "center");
    }
  }

  /** The token nearest to a place of the picture, among those on the near side; -1 for none. */
  function token(x, y) {
    let best = -1, least = 14 ** 2;
    for (let j = 0; j < n; j += 1) {
      const far = film.wires.length && solid && shown[3 * j + 2] < 0 ? 100 : 0;
      const distance = (shown[3 * j] - x) ** 2 + (shown[3 * j + 1] - y) ** 2 + far;
      if (distance < least) [best, least] = [j, distance];
    }
    return best;
  }

  return { canvas, view, solid, fit, draw, token, place: (j) => [shown[3 * j], shown[3 * j + 1]] };
}
