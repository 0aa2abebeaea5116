// The page of several runs.

const {runs, kinds} = content;

function head() {
  document.getElementById("head").append(list(content.notes, "findings notes") || "");
  const headings = [...new Set(content.asked.flatMap((own) => Object.keys(own)))];
  const differs = (heading) => new Set(content.asked.map((own) => own[heading])).size > 1;
  const rows = headings.filter(differs).map((heading) => [heading, ...content.asked.map((own) => own[heading] || "-")]);
  const alike = headings.filter((heading) => !differs(heading)).map((heading) => [heading, content.asked[0][heading]]);
  section("asked", "What was asked for", facts(alike), rows.length ? table(["", ...runs], rows) : null);
}

function curves() {
  const box = el("div");
  const draw = (kind) => box.replaceChildren(...charts(content.charts.filter((own) => own.kind === kind), chart));
  section("curves", "Curves",
    el("p", {class: "soft"}, "Hover, or focus a chart and press the arrow keys, to read values."),
    el("div", {class: "controls"}, kinds.length > 1 ? select("Weights", kinds, draw) : null), box);
  draw(kinds[0]);
}

function lastValues() {
  const box = el("div");
  const draw = (kind) => {
    const head = ["", ...runs.flatMap((name, i) => i ? [header(name), header("difference")] : [header(name)])];
    const rows = content.last[kind].map((row) => [el("td", {}, term(row.name)), ...row.cells.flatMap((own, i) => {
      const value = number(shown(own.value), isNumber(own.half) ? ` \u00b1 ${shown(own.half)}` : "");
      return i ? [value, differenceOf(own, row.is_better_up)] : [value];
    })]);
    box.replaceChildren(table(head, rows));
  };
  section("last", "Last values",
    el("p", {class: "soft"}, `\u00b1 is half of the 95 % interval over prompts. Differences are from ${runs[0]}, on the same samples where there is an interval; bold where that excludes 0.`),
    el("div", {class: "controls"}, kinds.length > 1 ? select("Weights", kinds, draw) : null), box);
  draw(kinds[0]);
}

function differenceOf(own, isBetterUp) {
  if (!own.is_same) return number(el("span", {class: "soft"}, "not the same measure"));
  if (!isNumber(own.difference)) return number("-");
  if (!isNumber(own.low)) return number(signed(own.difference));
  const isClear = own.low > 0 || own.high < 0;
  const kind = !isClear ? "" : !isBetterUp ? "clear" : own.difference > 0 ? "better" : "worse";
  return number(el("span", {class: kind}, signed(own.difference)), ` (${signed(own.low)} to ${signed(own.high)})`);
}

function pictures() {
  const box = el("div", {class: "grid"});
  const columns = (kind) => [["base", "base"], ...runs.map((name, i) => [name, `${i}/${kind}`])];
  const figures = (prompt, kind, open) => columns(kind).filter(([, block]) => picture(block, String(prompt.index))).map(([name, block]) => {
    const img = image(block, String(prompt.index), `${prompt.prompt}, ${name}`);
    return el("figure", {}, open ? el("button", {type: "button", onclick: open}, img) : img, el("figcaption", {}, name));
  });
  const draw = (kind) => box.replaceChildren(...content.prompts.map((prompt) => {
    const open = () => enlarge(prompt.prompt, figures(prompt, kind, null));
    return el("article", {class: "card"}, el("p", {class: "prompt", title: prompt.prompt}, prompt.prompt), el("div", {class: "row"}, ...figures(prompt, kind, open)));
  }));
  section("pictures", "The same prompts",
    el("p", {class: "soft"}, content.prompts.length ? "The last logged picture of each run, from the same noise. A picture opens large." : "The runs have logged no pictures of the same prompts from the same noise."),
    el("div", {class: "controls"}, kinds.length > 1 ? select("Weights", kinds, draw) : null), box);
  draw(kinds[0]);
}

function settings() {
  const value = (own) => el("td", {}, el("code", {}, typeof own === "string" ? own : own === null || own === undefined ? "-" : JSON.stringify(own)));
  const rows = content.settings.map((row) => [el("td", {}, el("code", {}, row.name)), ...row.values.map(value)]);
  section("settings", "Settings that differ", rows.length ? table(["Setting", ...runs], rows) : el("p", {}, "None."));
}

head();
curves();
lastValues();
pictures();
settings();
end(content.name);
