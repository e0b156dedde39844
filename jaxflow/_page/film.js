"use strict";

const RATE = 20; // saved times a second, at speed 1

/** Curves beside the tokens. */
function panels(film) {
  return film.panels.map((panel) => {
    const host = byId("panels").appendChild(element("figure"));
    const drawn = chart(host, { name: panel.name, xLabel: "t", logX: film.log_time, logY: panel.log });
    drawn.show([{ name: panel.name, colour: "var(--c0)", x: panel.t, y: panel.y, step: panel.step, dots: panel.dots }]);
    return drawn;
  });
}

function player(film, points) {
  const picture = scene(film, points), curves = panels(film);
  const last = film.ts.length - 1, slider = byId("time");
  let position = 0, playing = false, before = 0, drawn = -1;
  slider.max = last;

  function show() {
    picture.draw(position);
    const k = Math.floor(position + 1e-6);
    if (k === drawn) return;
    drawn = k;
    const told = `t = ${format(film.ts[k])}`;
    slider.value = k;
    slider.setAttribute("aria-valuetext", told);
    byId("now").textContent = told;
    curves.forEach((curve) => curve.mark(film.ts[k]));
  }

  /** The clock decides where the film is: a slow picture leaves some out, and does not slow it. */
  function tick(now) {
    if (!playing) return;
    // Not what went by while the page was not shown. A frame's time may lie before play's own.
    const gone = Math.max(0, Math.min(now - before, 250));
    position += (gone / 1000) * RATE * Number(byId("speed").value);
    before = now;
    if (position >= last) { position = last; pause(); } else requestAnimationFrame(tick);
    show();
  }

  function play() {
    if (position >= last) position = 0;
    playing = true;
    before = performance.now();
    byId("play").textContent = "❚❚ Pause";
    requestAnimationFrame(tick);
  }

  function pause() {
    playing = false;
    byId("play").textContent = "▶ Play";
  }

  const toggle = () => (playing ? pause() : play());
  function go(k) {
    pause();
    position = Math.max(0, Math.min(last, k));
    show();
  }

  const turn = (yaw, pitch) => {
    picture.view.yaw += yaw;
    picture.view.pitch = Math.max(-1.57, Math.min(1.57, picture.view.pitch + pitch));
    show();
  };
  const zoom = (factor) => {
    picture.view.zoom = Math.max(0.3, Math.min(20, picture.view.zoom * factor));
    show();
  };
  const step = (by) => go(by > 0 ? Math.floor(position + 1e-6) + by : Math.ceil(position - 1e-6) + by);

  byId("play").addEventListener("click", toggle);
  byId("back").addEventListener("click", () => step(-1));
  byId("forward").addEventListener("click", () => step(1));
  slider.addEventListener("input", () => go(Number(slider.value)));
  keys({ toggle, step, go, last, turn, zoom, solid: picture.solid });
  pointer(picture, film, turn, zoom);
  const fit = () => { picture.fit(); show(); };
  new ResizeObserver(fit).observe(picture.canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", fit);
  fit();
}

function keys({ toggle, step, go, last, turn, zoom, solid }) {
  const turns = { ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, 0.1], ArrowDown: [0, -0.1] };
  const acts = {
    " ": toggle, ArrowLeft: () => step(-1), ArrowRight: () => step(1),
    Home: () => go(0), End: () => go(last), "+": () => zoom(1.15), "-": () => zoom(1 / 1.15),
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const own = event.target.tagName; // a control that is in focus does what its own keys say
    if (own === "SELECT" || (own === "BUTTON" && event.key === " ")) return;
    const turned = solid && event.shiftKey && turns[event.key];
    const act = turned ? () => turn(...turned) : acts[event.key];
    if (act === undefined) return;
    event.preventDefault();
    act();
  });
  byId("keys").textContent = "Keys: space plays and pauses, ← and → step, Home and End go to the ends"
    + (solid ? "; drag, or shift with the arrows, turns; the wheel, or + and −, zooms." : ".");
}

/** Dragging turns, the wheel and two fingers zoom, and the token under the pointer is told. */
function pointer(picture, film, turn, zoom) {
  const { canvas } = picture, tip = byId("tip"), down = new Map();
  canvas.classList.toggle("flat", !picture.solid);
  const apart = () => {
    const [a, b] = [...down.values()];
    return Math.hypot(a[0] - b[0], a[1] - b[1]);
  };
  function tell(event) {
    const j = picture.token(event.offsetX, event.offsetY);
    tip.hidden = j < 0;
    if (j < 0) return;
    tip.textContent = `${film.labels === null ? `token ${film.tokens[j]}` : film.labels[j]}\ncluster ${film.clusters[j]}`;
    const [x, y] = picture.place(j);
    [tip.style.left, tip.style.right] = x > canvas.clientWidth / 2
      ? ["auto", `${canvas.clientWidth - x + 10}px`] : [`${x + 10}px`, "auto"];
    tip.style.top = `${y + 10}px`;
  }
  canvas.addEventListener("pointerdown", (event) => {
    down.set(event.pointerId, [event.clientX, event.clientY]);
    canvas.setPointerCapture(event.pointerId);
    tell(event);
  });
  canvas.addEventListener("pointermove", (event) => {
    const before = down.get(event.pointerId);
    if (before === undefined) return tell(event);
    if (!picture.solid) return;
    tip.hidden = true;
    const distance = down.size === 2 ? apart() : null;
    down.set(event.pointerId, [event.clientX, event.clientY]);
    if (distance) zoom(apart() / distance);
    else if (down.size === 1) turn((before[0] - event.clientX) / 150, (event.clientY - before[1]) / 150);
  });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, (event) => down.delete(event.pointerId));
  canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
  if (!picture.solid) return;
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(Math.exp(-event.deltaY / 600));
  }, { passive: false });
}

/** A page that shows this one in a frame is told how tall it is. */
function tellHeight() {
  if (parent === window) return;
  const tell = () => parent.postMessage({ height: document.documentElement.offsetHeight }, "*");
  new ResizeObserver(tell).observe(document.documentElement);
}

async function start() {
  try {
    const film = pageData();
    byId("title").textContent = film.title;
    byId("about").textContent = film.about;
    player(film, await unpack(film));
  } catch (error) {
    byId("failure").textContent = `The film of this page cannot be played, as it is damaged: ${error.message}.`;
    byId("failure").hidden = false;
  }
}
tellHeight();
start();
