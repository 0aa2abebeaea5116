// Curves: one small chart for each number. Series differ by colour, dash and marker.

const WIDTH = 330, HEIGHT = 190, LEFT = 48, RIGHT = 10, TOP = 12, BOTTOM = 24;
const MAX_MARKERS = 25;
const DASHES = ["", "7 3", "2 3", "9 3 2 3", "12 4", "4 4"];
const MARKERS = [
  (x, y) => svg("circle", {cx: x, cy: y, r: 3.2}),
  (x, y) => svg("rect", {x: x - 3, y: y - 3, width: 6, height: 6}),
  (x, y) => svg("path", {d: `M${x} ${y - 4}L${x + 4} ${y + 3}H${x - 4}Z`}),
  (x, y) => svg("path", {d: `M${x} ${y - 4}L${x + 4} ${y}L${x} ${y + 4}L${x - 4} ${y}Z`}),
];

/** Round numbers between two, about so many. */
function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((own) => own * power).find((own) => own >= rough);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(i * step);
  return found;
}

function style(series, number) {
  const hasMarkers = !series.is_level && series.points.length <= MAX_MARKERS;
  return {stroke: series.is_level ? "var(--base)" : `var(--s${number % 6})`, dash: series.is_level ? "3 4" : DASHES[number % 6], marker: hasMarkers ? MARKERS[number % 4] : null};
}

/** The sign of a series beside its name. */
function key(look) {
  const line = svg("path", {d: "M1 5H25", class: "line", "stroke-dasharray": look.dash});
  line.style.stroke = look.stroke;
  const made = svg("svg", {class: "key", viewBox: "0 0 26 10", "aria-hidden": "true"}, line);
  if (look.marker) {
    const marker = look.marker(13, 5);
    marker.style.fill = look.stroke;
    made.append(marker);
  }
  return made;
}

function extent(values) {
  const low = Math.min(...values), high = Math.max(...values);
  const room = (high - low || Math.abs(high) || 1) * 0.06;
  return [low - room, high + room];
}

/**
 * A chart: name, `series` [{name, points: [[step, value], ...]}], and `advice` [{step, acts, text}] that is drawn over it.
 * A series with `is_level`, the base's, is a level. Arrow keys and the pointer read values off.
 */
function chart({name, series, advice = []}) {
  const clean = series.map((own) => ({...own, points: own.points.filter((point) => isNumber(point[1]))})).filter((own) => own.points.length);
  let place = 0;
  clean.sort((a, b) => Boolean(b.is_level) - Boolean(a.is_level));
  const lines = clean.map((own) => ({...own, look: style(own, own.is_level ? 0 : place++)}));
  const box = el("article", {class: "chart"}, el("h3", {}, term(name)));
  if (!lines.length) return box.append(el("p", {class: "soft"}, "No finite values.")), box;
  const steps = [...new Set(lines.filter((own) => !own.is_level || lines.length === 1).flatMap((own) => own.points.map((point) => point[0])))].sort((a, b) => a - b);
  const [low, high] = extent(lines.flatMap((own) => own.points.map((point) => point[1])));
  const first = Math.min(0, steps[0]), last = Math.max(steps.at(-1), first + 1);
  const x = (step) => LEFT + (WIDTH - LEFT - RIGHT) * (step - first) / (last - first);
  const y = (value) => TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low);
  const drawing = svg("svg", {viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", tabindex: "0", "aria-label": described(name, lines)});
  for (const value of ticks(low, high, 4)) {
    drawing.append(svg("line", {class: "rule", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value)}), svg("text", {x: LEFT - 5, y: y(value) + 4, "text-anchor": "end"}, String(Number(value.toPrecision(6)))));
  }
  for (const step of ticks(first, last, 5).filter(Number.isInteger)) {
    drawing.append(svg("text", {x: x(step), y: HEIGHT - 8, "text-anchor": "middle"}, String(step)));
  }
  for (const own of advice.filter((own) => own.step >= first && own.step <= last)) {
    drawing.append(svg("line", {class: "advice", x1: x(own.step), x2: x(own.step), y1: TOP, y2: HEIGHT - BOTTOM}), svg("text", {class: "warned", x: x(own.step), y: TOP - 1, "text-anchor": "middle"}, own.acts ? "!!" : "!"));
  }
  for (const own of lines) drawing.append(...drawn(own, x, y, last));
  const cursor = svg("line", {class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden"});
  drawing.append(cursor);
  const readout = el("div", {class: "readout"});
  readOff(drawing, cursor, readout, lines, steps, x);
  box.append(drawing, readout, ...advice.map((own) => el("p", {class: "said"}, `${own.acts ? "!!" : "!"} Step ${own.step}: ${own.text}`)));
  return box;
}

function described(name, lines) {
  const ends = lines.map((own) => `${own.name} ${shown(own.points[0][1])} at step ${own.points[0][0]}, ${shown(own.points.at(-1)[1])} at step ${own.points.at(-1)[0]}`);
  return `${name}: ${ends.join("; ")}`;
}

function drawn(own, x, y, last) {
  const points = own.is_level && own.points.length === 1 ? [own.points[0], [last, own.points[0][1]]] : own.points;
  const line = svg("path", {class: "line", "stroke-dasharray": own.look.dash, d: `M${points.map(([step, value]) => `${x(step).toFixed(1)} ${y(value).toFixed(1)}`).join("L")}`});
  line.style.stroke = own.look.stroke;
  const markers = own.look.marker ? own.points.map(([step, value]) => own.look.marker(x(step), y(value))) : [];
  for (const marker of markers) marker.style.fill = own.look.stroke;
  return [line, ...markers];
}

function readOff(drawing, cursor, readout, lines, steps, x) {
  let at = steps.length - 1;
  const show = (isMoved) => {
    const step = steps[at];
    cursor.setAttribute("visibility", isMoved ? "visible" : "hidden");
    set(cursor, {x1: x(step), x2: x(step)});
    readout.replaceChildren(el("span", {class: "soft"}, `step ${step}`), ...lines.map((own) => {
      const point = own.points.findLast((point) => point[0] <= step);
      return el("span", {}, key(own.look), `${own.name} ${point ? shown(point[1]) : "-"}`);
    }));
  };
  const nearest = (event) => {
    const rect = drawing.getBoundingClientRect();
    const px = (event.clientX - rect.left) * WIDTH / rect.width;
    at = steps.reduce((best, step, i) => Math.abs(x(step) - px) < Math.abs(x(steps[best]) - px) ? i : best, 0);
    show(true);
  };
  drawing.addEventListener("keydown", (event) => {
    const moves = {ArrowLeft: -1, ArrowRight: 1, Home: -steps.length, End: steps.length};
    if (!(event.key in moves)) return;
    event.preventDefault();
    at = Math.max(0, Math.min(steps.length - 1, at + moves[event.key]));
    show(true);
  });
  set(drawing, {onpointermove: nearest, onpointerdown: nearest, onpointerleave: () => { at = steps.length - 1; show(false); }});
  show(false);
}

/** All charts under their headings. */
function charts(all, draw) {
  const groups = [...new Set(all.map((own) => own.group))];
  const isNarrow = matchMedia("(max-width: 40rem)").matches;
  return groups.map((group, i) => el("details", {open: !isNarrow || i === 0}, el("summary", {}, group),
    el("div", {class: "charts"}, ...all.filter((own) => own.group === group).map(draw))));
}
