// The page of one run.

const {grid, samples} = content;

function head() {
  document.getElementById("head").append(
    list(content.findings, "findings") || "",
    list(content.advice.filter((own) => own.acts).map((own) => `Step ${own.step}: ${own.text}`), "findings notes") || "",
    list(content.notes, "findings notes") || "");
  section("asked", "What was asked for", facts(content.asked));
}

/** Base, policy and ema of each prompt, after the step that the slider is at. */
function beforeAndAfter() {
  if (!grid.prompts.length) return section("pictures", "Before and after", el("p", {class: "soft"}, "No pictures are logged yet (SampleLogger)."));
  const columns = Object.keys(Object.values(grid.scores).flatMap((own) => Object.values(own))[0] || {}).filter((own) => own !== "label");
  const state = {at: Math.max(0, grid.steps.length - 1), column: columns.includes("held_out") ? "held_out" : columns[0]};
  const cards = grid.prompts.map((prompt) => card(prompt, state));
  const output = el("output", {for: "step"});
  const refresh = () => {
    output.textContent = grid.steps.length ? `step ${grid.steps[state.at]}` : "base only";
    slider.setAttribute("aria-valuetext", output.textContent);
    for (const own of cards) own.refresh();
  };
  const slider = el("input", {id: "step", type: "range", min: 0, max: Math.max(0, grid.steps.length - 1), value: state.at, oninput: () => { state.at = Number(slider.value); refresh(); }});
  const left = grid.all > grid.steps.length ? `${grid.steps.length} of ${grid.all} steps with pictures are kept in this page. ` : "";
  section("pictures", "Before and after",
    el("p", {class: "soft"}, `${left}The same prompts from the same noise. The arrow keys move the slider; a picture opens large.`),
    el("div", {class: "controls"}, el("label", {for: "step"}, "After", slider, output),
      columns.length ? select("Score", order(columns, state.column), (own) => { state.column = own; refresh(); }) : null),
    el("div", {class: "grid"}, ...cards.map((own) => own.element)));
  refresh();
}

function order(names, first) { return [first, ...names.filter((own) => own !== first)]; }

function card(prompt, state) {
  const figures = ["base", ...grid.weights].map((kind) => figureOf(prompt, kind));
  const refresh = () => { for (const own of figures) own.refresh(state); };
  const open = () => enlarge(prompt.prompt, ["base", ...grid.weights].map((kind) => {
    const own = figureOf(prompt, kind);
    own.refresh(state, true);
    return own.element;
  }));
  for (const own of figures) own.button.addEventListener("click", open);
  const element = el("article", {class: "card"}, el("p", {class: "prompt", title: prompt.prompt}, prompt.prompt), el("div", {class: "row"}, ...figures.map((own) => own.element)));
  return {element, refresh};
}

function figureOf(prompt, kind) {
  const index = String(prompt.index);
  const img = el("img");
  img.addEventListener("load", () => img.classList.toggle("small", img.naturalWidth <= 128));
  const missing = el("div", {class: "missing"}, "not logged");
  missing.style.display = "none";
  const button = el("button", {type: "button"}, img, missing);
  const caption = el("figcaption");
  const element = el("figure", {}, button, caption);
  let isSeen = false, state = null;
  const fill = () => {
    const step = grid.steps[state.at];
    const url = kind === "base" ? picture("base", index) : picture(String(step), `${kind}/${index}`);
    img.style.display = url ? "" : "none";
    missing.style.display = url ? "none" : "";
    if (url && img.src !== url) img.src = url;
  };
  whenSeen(element, () => { isSeen = true; fill(); });
  const refresh = (now, isAtOnce = false) => {
    state = now;
    const step = grid.steps[state.at];
    const score = (grid.scores[kind === "base" ? "base" : `${step}/${kind}`]?.[index] || {})[state.column];
    const before = (grid.scores.base?.[index] || {})[state.column];
    img.alt = `${prompt.prompt}, ${kind === "base" ? "before training" : `${kind} after ${step} steps`}`;
    caption.replaceChildren(kind, isNumber(score) ? ` ${shown(score)} ` : "", ...(kind !== "base" && isNumber(score) && isNumber(before) ? [change(score - before)] : []));
    if (isSeen || isAtOnce) fill();
  };
  return {element, button, refresh};
}

function curves() {
  const watched = (name) => ["held_out", "diversity", "drift"].includes(name);
  const said = (name) => content.advice.filter((own) => name === "held_out" || own.text.includes(name));
  section("curves", "Curves",
    el("p", {class: "soft"}, "Hover, or focus a chart and press the arrow keys, to read values. \u201c!\u201d is the guard's objection, \u201c!!\u201d where it acted."),
    ...charts(content.charts, (own) => chart({...own, advice: watched(own.name) ? said(own.name) : []})),
    content.last.length ? el("h4", {}, "Last values") : null,
    content.last.length ? lastValues() : null);
}

function lastValues() {
  const kinds = [...new Set(content.last.flatMap((row) => Object.keys(row.cells)))];
  const head = ["", ...kinds.flatMap((kind) => kind === "base" ? [header(kind)] : [header(kind), header(`${kind} wins`)])];
  const rows = content.last.map((row) => [el("td", {}, term(row.name)), ...kinds.flatMap((kind) => {
    const own = row.cells[kind] || {};
    const value = number(isNumber(own.value) ? shown(own.value) : "-", isNumber(own.half) ? ` \u00b1 ${shown(own.half)}` : "");
    const bounds = own.win && isNumber(own.win[1]) ? ` (${percent(own.win[1])} to ${percent(own.win[2])})` : "";
    return kind === "base" ? [value] : [value, number(own.win ? percent(own.win[0]) + bounds : "")];
  })]);
  return el("div", {}, table(head, rows), el("p", {class: "soft"}, "\u00b1 is half of the 95 % interval over prompts; wins is the share of samples that score higher than the base's from the same noise."));
}

/** Every sample beside the base's, worst first. */
function wonAndLost() {
  if (!samples) return section("samples", "Won and lost", el("p", {class: "soft"}, "Nothing to compare yet: it needs the base's numbers and an evaluation after it (RewardTracking)."));
  const state = {weights: samples.weights[0], column: samples.columns[0], by: "change", isDown: false, most: 30};
  const body = el("tbody"), counts = el("p", {class: "soft"}), more = el("button", {type: "button", onclick: () => { state.most += 200; refresh(); }});
  const titles = {prompt: "Prompt", base: "Base", ours: "Now", change: "Difference"};
  const heads = Object.entries(titles).map(([by, title]) => {
    const button = el("button", {type: "button", onclick: () => { state.isDown = state.by === by ? !state.isDown : false; state.by = by; refresh(); }}, title);
    return [by, el("th", {class: {prompt: "", base: "number optional"}[by] ?? "number", scope: "col"}, button)];
  });
  const refresh = () => {
    const rows = sorted(state);
    const {won, lost, alike, unknown} = samples.counts[state.weights][state.column];
    const part = samples.total > rows.length ? ` Of ${samples.total} samples the worst and the best ${rows.length / 2} by ${samples.columns[0]} of ${samples.weights[0]} are listed.` : "";
    counts.textContent = `Step ${samples.step}: ${won} samples won, ${lost} lost, ${alike} alike${unknown ? `, ${unknown} without a number` : ""}.${part}`;
    for (const [by, th] of heads) th.setAttribute("aria-sort", by !== state.by ? "none" : state.isDown ? "descending" : "ascending");
    const most = Math.max(...rows.map((own) => Math.abs(own.change) || 0), 1e-12);
    body.replaceChildren(...rows.slice(0, state.most).map((own) => rowOf(own, state, most)));
    more.hidden = rows.length <= state.most;
    more.textContent = `Show more (${rows.length - state.most} left)`;
  };
  section("samples", "Won and lost",
    el("p", {class: "soft"}, "Each measured sample beside the base's from the same noise. The headings sort." + (samples.has_unnamed ? " A prompt that is a number here was not recorded in words." : "")),
    el("div", {class: "controls"},
      select("Score", samples.columns, (own) => { state.column = own; refresh(); }),
      samples.weights.length > 1 ? select("Weights", samples.weights, (own) => { state.weights = own; refresh(); }) : null),
    counts,
    el("div", {class: "wide"}, el("table", {}, el("thead", {}, el("tr", {}, el("th", {}, "Before"), el("th", {}, "Now"), heads[0][1], ...heads.slice(1).map((own) => own[1]), el("th", {class: "optional"}))), body)),
    more);
  refresh();
}

function sorted(state) {
  const base = samples.values.base[state.column], ours = samples.values[state.weights][state.column];
  const rows = samples.indices.map((index, i) => ({index, prompt: samples.prompts[i], base: base[i], ours: ours[i], change: isNumber(ours[i]) && isNumber(base[i]) ? ours[i] - base[i] : NaN}));
  const sign = state.isDown ? -1 : 1;
  const value = (own) => state.by === "prompt" ? own.prompt : own[state.by];
  return rows.sort((a, b) => {
    const [one, other] = [value(a), value(b)];
    if (state.by === "prompt") return sign * one.localeCompare(other) || a.index - b.index;
    return (isNumber(other) ? 1 : 0) - (isNumber(one) ? 1 : 0) || sign * (one - other) || a.index - b.index;
  });
}

function rowOf(own, state, most) {
  const step = String(samples.step), key = `${state.weights}/${own.index}`;
  const thumb = (block, name, words) => picture(block, name) ? image(block, name, `${own.prompt}, ${words}`, {class: "thumb"}) : el("span", {class: "soft"}, "\u2013");
  const large = (words, block, name) => el("figure", {}, image(block, name, words), el("figcaption", {}, words));
  const open = () => enlarge(own.prompt, [large("base", "base", String(own.index)), large(`${state.weights}, step ${step}`, step, key)]);
  const hasPictures = picture("base", String(own.index)) && picture(step, key);
  const words = hasPictures ? el("button", {type: "button", class: "plain", onclick: open, title: "Show large"}, own.prompt) : own.prompt;
  const bar = svg("svg", {class: "bar", viewBox: "-50 0 100 10", "aria-hidden": "true", preserveAspectRatio: "none"});
  if (isNumber(own.change)) {
    const size = 50 * Math.abs(own.change) / most;
    const rect = svg("rect", {x: own.change < 0 ? -size : 0, y: 0, width: size, height: 10});
    rect.style.fill = own.change < 0 ? "var(--worse)" : "var(--better)";
    bar.append(rect, svg("line", {class: "rule", x1: 0, x2: 0, y1: 0, y2: 10, stroke: "currentColor"}));
  }
  return el("tr", {}, el("td", {}, thumb("base", String(own.index), "before training")), el("td", {}, thumb(step, key, `after ${step} steps`)),
    el("td", {class: "prompt"}, words, el("span", {class: "soft optional"}, ` #${own.index}`)),
    el("td", {class: "number optional"}, shown(own.base)), number(shown(own.ours)), number(change(own.change)), el("td", {class: "optional"}, bar));
}

function configuration() {
  const {text, departures} = content.configuration;
  const value = (own) => el("code", {}, typeof own === "string" ? own : JSON.stringify(own));
  const rows = departures ? departures.rows.map(([name, now, then]) => [el("td", {}, el("code", {}, name)), el("td", {}, value(now)), el("td", {}, value(then))]) : [];
  section("configuration", "Configuration",
    departures && text ? el("p", {}, rows.length ? `What differs from ${departures.from}:` : `Nothing differs from ${departures.from}.`) : null,
    rows.length ? table(["Setting", "Here", "There"], rows) : null,
    text ? el("details", {}, el("summary", {}, "The whole configuration"), el("pre", {tabindex: "0"}, text)) : el("p", {class: "soft"}, "This folder has no configuration."));
}

head();
beforeAndAfter();
curves();
wonAndLost();
configuration();
end(content.name);
