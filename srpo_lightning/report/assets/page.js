"use strict";
// What pages share: elements, words, pictures that are read when they come into view. Texts are only ever set as text.

const content = JSON.parse(document.getElementById("content").textContent);

/** An element with attributes, listeners (`onclick`) and children; a text is a text, whatever it holds. */
function el(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  set(made, attributes);
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function set(element, attributes) {
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(key, value);
  }
}

const SVG = "http://www.w3.org/2000/svg";

function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, name);
  set(made, attributes);
  made.append(...children);
  return made;
}

function isNumber(value) { return typeof value === "number" && Number.isFinite(value); }

function shown(value, digits = 3) {
  if (!isNumber(value)) return "-";
  const size = Math.abs(value);
  return size !== 0 && (size < 0.001 || size >= 1e5) ? value.toExponential(2) : value.toFixed(size < 10 ? digits : 1);
}

function signed(value) { return isNumber(value) ? (value > 0 ? "+" : value < 0 ? "\u2212" : "") + shown(Math.abs(value)) : "-"; }

function percent(value) { return `${Math.round(100 * value)} %`; }

/** A number's name, which tells on hover and focus what it is. */
function term(name, text = name) {
  const meaning = content.meanings[name];
  if (!meaning) return el("span", {}, text);
  const word = el("span", {class: "term", tabindex: "0", "aria-describedby": "tip"}, text);
  const tip = document.getElementById("tip");
  const show = () => {
    tip.textContent = meaning;
    tip.hidden = false;
    const at = word.getBoundingClientRect();
    tip.style.left = `${Math.max(8, Math.min(at.left, innerWidth - tip.offsetWidth - 8))}px`;
    const above = at.top - tip.offsetHeight - 6;
    tip.style.top = `${above > 0 ? above : at.bottom + 6}px`;
  };
  const hide = () => { tip.hidden = true; };
  set(word, {onmouseenter: show, onfocus: show, onmouseleave: hide, onblur: hide});
  word.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  return word;
}

const blocks = new Map();

/** A picture's data URI, or "": its block is parsed when the first picture of it is wanted. */
function picture(block, key) {
  if (!blocks.has(block)) {
    const found = document.querySelector(`script[data-pictures="${CSS.escape(block)}"]`);
    blocks.set(block, found ? JSON.parse(found.textContent) : {});
  }
  return blocks.get(block)[key] || "";
}

const AHEAD_PX = 400;
const waiting = new Map();
const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) fill(entry.target);
}, {rootMargin: `${AHEAD_PX}px`});

function fill(element) {
  seen.unobserve(element);
  waiting.get(element)?.();
  waiting.delete(element);
}

/** Call a function once, when an element comes near the view. */
function whenSeen(element, action) {
  waiting.set(element, action);
  seen.observe(element);
}

addEventListener("beforeprint", () => [...waiting.keys()].forEach(fill));

/** An image that is filled in when it comes near the view. */
function image(block, key, alternative, attributes = {}) {
  const made = el("img", {alt: alternative, ...attributes});
  made.addEventListener("load", () => made.classList.toggle("small", made.naturalWidth <= 128));
  whenSeen(made, () => { made.src = picture(block, key); });
  return made;
}

function section(id, title, ...children) {
  document.getElementById("contents").append(el("a", {href: `#${id}`}, title));
  document.getElementById("main").append(el("section", {id}, el("h2", {}, title), ...children));
}

function select(label, options, onchange) {
  const list = el("select", {onchange: () => onchange(list.value)}, ...options.map((own) => el("option", {value: own}, own)));
  return el("label", {}, label, list);
}

function facts(pairs) {
  return el("dl", {class: "facts"}, ...pairs.flatMap(([name, text]) => [el("dt", {}, name), el("dd", {}, text)]));
}

function list(texts, kind) {
  return texts.length ? el("div", {class: kind}, ...texts.map((text) => el("p", {}, text))) : null;
}

function table(head, rows) {
  const cell = (kind) => (own) => own instanceof Node && ["TD", "TH"].includes(own.tagName) ? own : el(kind, {}, own);
  return el("div", {class: "wide"}, el("table", {},
    el("thead", {}, el("tr", {}, ...head.map(cell("th")))),
    el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map(cell("td")))))));
}

function number(...children) { return el("td", {class: "number"}, ...children); }

function header(text) { return el("th", {class: "number"}, text); }

/** A change, in a colour and with a sign: one of both is enough. */
function change(value) {
  return el("span", {class: value > 0 ? "better" : value < 0 ? "worse" : ""}, signed(value));
}

/** Pictures beside each other, large; `draw` returns their figures. */
function enlarge(title, figures) {
  const box = document.getElementById("large");
  box.replaceChildren(
    el("div", {class: "controls"}, el("strong", {}, title), el("button", {onclick: () => box.close()}, "Close")),
    el("div", {class: "row"}, ...figures));
  box.showModal();
}

function end(name) {
  document.getElementById("head").prepend(el("h1", {}, name));
  document.getElementById("foot").append(`Written ${content.written}.`);
  // What is in view at once need not wait for the browser to say so.
  const isNear = (element) => element.isConnected && element.getBoundingClientRect().top < innerHeight + AHEAD_PX;
  [...waiting.keys()].filter(isNear).forEach(fill);
  if (location.hash) document.querySelector(`[id="${CSS.escape(location.hash.slice(1))}"]`)?.scrollIntoView();
}
