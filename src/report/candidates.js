"use strict";
// One row per line, parsed when shown, so that a page of ten thousand prompts opens instantly. All text is set as text.
const PAGE = 20;
const byId = (id) => document.getElementById(id);
const lines = byId("data").textContent.split("\n").filter((line) => line !== "");
let facts = null, shown = lines.map((_, at) => at), first = 0;

function element(name, text, kind) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

// The facts that filters and sort orders need of every row, read once on first use.
function known() {
  if (facts === null) facts = lines.map((line) => {
    const all = JSON.parse(line).candidates, scores = all.map((one) => one.score);
    const best = Math.max(...scores), worst = Math.min(...scores);
    return { best, spread: best - worst, passed: all.some((one) => one.passed === true),
      failed: all.some((one) => one.passed === false), reference: all.some((one) => one.origin === "reference") };
  });
  return facts;
}

const filters = {
  passed: (fact) => fact.passed,
  failed: (fact) => fact.failed && !fact.passed,
  mixed: (fact) => fact.passed && fact.failed,
  reference: (fact) => fact.reference,
};
const orders = {
  low: (a, b) => a.best - b.best,
  high: (a, b) => b.best - a.best,
  spread: (a, b) => b.spread - a.spread,
};

function textOf(content) {
  if (typeof content === "string") return content;
  if (Array.isArray(content)) return content.map((part) => part.text || "").join("");
  return content === null || content === undefined ? "" : JSON.stringify(content);
}

function matches(row, words) {
  const text = row.prompt.map((one) => textOf(one.content)).concat(row.candidates.map((one) => one.text), row.answer || "");
  const lower = text.join("\n").toLowerCase();
  return words.every((word) => lower.includes(word));
}

function choose() {
  const words = byId("search").value.toLowerCase().split(/\s+/).filter((word) => word !== "");
  const keep = filters[byId("filter").value], order = orders[byId("order").value];
  shown = lines.map((_, at) => at);
  if (keep) shown = shown.filter((at) => keep(known()[at]));
  if (words.length) shown = shown.filter((at) => matches(JSON.parse(lines[at]), words));
  if (order) shown.sort((a, b) => order(known()[a], known()[b]) || a - b);
  first = 0;
  show();
}

// Words shared by two texts in order (longest common subsequence); long texts are shown unchanged.
function differences(worse, better) {
  const a = worse.split(/(\s+)/), b = better.split(/(\s+)/);
  if (a.length * b.length > 4e6) return [["del", worse], ["ins", better]];
  const width = b.length + 1, common = new Uint32Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--) for (let j = b.length - 1; j >= 0; j--) {
    common[i * width + j] = a[i] === b[j] ? common[(i + 1) * width + j + 1] + 1
      : Math.max(common[(i + 1) * width + j], common[i * width + j + 1]);
  }
  const parts = [];
  let i = 0, j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) { parts.push(["span", a[i]]); i++; j++; }
    else if (j < b.length && (i === a.length || common[i * width + j + 1] >= common[(i + 1) * width + j])) parts.push(["ins", b[j++]]);
    else parts.push(["del", a[i++]]);
  }
  return parts;
}

const number = (value) => Number(value.toPrecision(4)).toString();

function candidate(one, rank) {
  const box = element("div", undefined, "one"), line = element("div", undefined, "facts");
  line.append(element("b", `${rank}. ${number(one.score)} `));
  if (one.passed === true) line.append(element("span", "passed ", "passed"));
  if (one.passed === false) line.append(element("span", "failed ", "failed"));
  const details = [one.origin, `${one.tokens} tokens`, `${[...one.text].length} characters`];
  if (one.finish === "length") details.push("cut off");
  for (const [judge, score] of Object.entries(one.scores || {})) {
    const why = (one.why || {})[judge];
    details.push(`${judge} ${number(score)}${why ? ` (${why})` : ""}`);
  }
  // A judge that failed gives a reason and no score.
  for (const [judge, why] of Object.entries(one.why || {})) if (!(judge in (one.scores || {}))) details.push(`${judge}: ${why}`);
  line.append(element("span", details.join(" · ")));
  box.append(line, element("pre", one.text));
  for (const stream of ["stdout", "stderr"]) if (one[stream]) {
    const written = element("details");
    written.append(element("summary", stream, "facts"), element("pre", one[stream], "asked"));
    box.append(written);
  }
  return box;
}

function article(at) {
  const row = JSON.parse(lines[at]), box = element("article");
  const ranked = row.candidates.map((one, drawn) => [one, drawn]).sort((a, b) => b[0].score - a[0].score || a[1] - b[1]).map((pair) => pair[0]);
  box.append(element("h3", `Prompt ${at + 1}`));
  for (const message of row.prompt) box.append(element("pre", `${message.role}: ${textOf(message.content)}`, "asked"));
  if (row.answer) box.append(element("div", `right answer: ${row.answer}`, "facts"));
  if (row.unanswered) box.append(element("div", "too long for the model or refused: nothing was drawn", "facts"));
  if (byId("diff").checked && ranked.length > 1) {
    const text = element("pre", undefined, "one");
    for (const [kind, part] of differences(ranked[ranked.length - 1].text, ranked[0].text)) text.append(element(kind, part));
    box.append(text);
  }
  ranked.forEach((one, rank) => box.append(candidate(one, rank + 1)));
  return box;
}

function show() {
  byId("rows").replaceChildren(...shown.slice(first, first + PAGE).map(article));
  byId("where").textContent = shown.length ? `${first + 1}–${Math.min(first + PAGE, shown.length)} of ${shown.length}` : "none";
  byId("back").disabled = first === 0;
  byId("next").disabled = first + PAGE >= shown.length;
}

function turn(by) {
  first = Math.max(0, first + by);
  show();
  window.scrollTo(0, 0);
}

byId("controls").addEventListener("submit", (event) => event.preventDefault());
for (const id of ["search", "filter", "order"]) byId(id).addEventListener("input", choose);
byId("diff").addEventListener("change", show);
byId("back").addEventListener("click", () => turn(-PAGE));
byId("next").addEventListener("click", () => turn(PAGE));
show();
