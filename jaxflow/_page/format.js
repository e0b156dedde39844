"use strict";

const byId = (id) => document.getElementById(id);

/** What the data element of the page holds. */
const pageData = () => JSON.parse(byId("data").textContent);

/** A number for people, of at most `digits` digits. */
function format(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  if (value === 0) return "0";
  const size = Math.abs(value);
  const plain = size >= 1e-3 && size < 1e6;
  const text = plain ? String(Number(value.toPrecision(Math.max(digits, Math.ceil(Math.log10(size))))))
    : value.toExponential(digits - 1).replace(/\.?0+e/, "e").replace("e+", "e");
  return text.replace("-", "−");
}

/** An element with attributes and children; text is text, never HTML. */
function element(name, attributes = {}, ...children) {
  const made = name.startsWith("svg:")
    ? document.createElementNS("http://www.w3.org/2000/svg", name.slice(4))
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}
