"use strict";

/**
 * The coordinates as numbers of 14 bits, (n, k, times).
 *
 * They are kept as differences in time, signs last, all low bytes before all high ones, deflated.
 */
async function unpack(film) {
  const packed = Uint8Array.from(atob(film.points), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
  const size = film.shape.reduce((a, b) => a * b);
  if (bytes.length !== 2 * size) throw new Error(`${bytes.length} bytes of points, not ${2 * size}`);
  const times = film.shape[2], found = new Uint16Array(size);
  for (let i = 0; i < size; i += 1) {
    const z = bytes[i] | (bytes[size + i] << 8);
    const change = (z >>> 1) ^ -(z & 1);
    found[i] = change + (i % times ? found[i - 1] : 0);
  }
  return found;
}

/** Where the tokens are at a position between saved times, (n, k), and the window they are in. */
function placer(film, points) {
  const [n, k, times] = film.shape;
  const place = new Float32Array(n * k);
  return (position) => {
    const before = Math.min(Math.floor(position), times - 1), after = Math.min(before + 1, times - 1);
    const share = position - before;
    const ends = [before, after].map((time) => film.windows[Math.min(time, film.windows.length - 1)]);
    for (let a = 0; a < k; a += 1) {
      const [[low, high], [low2, high2]] = ends.map((window) => window[a]);
      const [unit, unit2] = [(high - low) / 16383, (high2 - low2) / 16383];
      for (let j = 0; j < n; j += 1) {
        const at = (j * k + a) * times;
        const now = low + unit * points[at + before];
        place[j * k + a] = now + share * (low2 + unit2 * points[at + after] - now);
      }
    }
    const window = ends[0].map(([low, high], a) => [
      low + share * (ends[1][a][0] - low), high + share * (ends[1][a][1] - high)]);
    return [place, window];
  };
}
