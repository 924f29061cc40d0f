// What a score is made of, by the rules of harness/metrics.py. Nothing here needs a page.

const KINDS = { efficacy: "rewrite", generalization: "paraphrase", locality: "neighborhood" };
const UNITS = { gold_margin: " nats", fluency: " bits", consistency: "" }; // of what is no share
const SETTING = ["editor", "cell", "slice", "merger", "pruning_ratio", "router", "top_k"]; // names a record
const TEXT_FIELDS = ["prompt", "text"]; // kept as positions among the texts

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const harmonic = (rates) =>
  rates.every((rate) => rate > 0) ? rates.length / rates.reduce((sum, rate) => sum + 1 / rate, 0) : 0;
const isTask = (kind) => kind.startsWith("task:");

function margin({ choice_logprobs, gold }) {
  return choice_logprobs[gold] - Math.max(...choice_logprobs.filter((_, choice) => choice !== gold));
}

// The parts of a metric, three of `score` and else one: the kind of their prompts (null: any) and what one
// prompt counts, where that is known.
function partsOf(metric, slice) {
  const [, name, view = ""] = /^(.+?)(_argmax|_overlap|_any|_exact)?$/.exec(metric);
  if (metric === "score") return Object.keys(KINDS).flatMap((each) => partsOf(each, slice));
  if (name in KINDS) {
    const [right, other] = name === "locality" ? ["true", "new"] : ["new", "true"];
    const count = {
      "": ({ shown }) => Number(shown[`nll_${right}`] < shown[`nll_${other}`]),
      _argmax: ({ shown }) => Number(shown[`argmax_${right}`]),
      _overlap: ({ shown }) => shown[`tokens_right_${right}`] / shown[`tokens_${right}`],
    }[view];
    return [{ kind: KINDS[name], count }];
  }
  if (name.startsWith("route_")) {
    const own = name.slice("route_".length);
    const kind = isTask(slice) ? slice : slice === "probes" ? `probe:${own}` : own;
    return [{ kind, count: ({ route }) => Number(route === "edited") }];
  }
  if (isTask(slice)) {
    const right = ({ shown }) => Number(shown.pred === shown.gold);
    const count = {
      accuracy: right,
      f1_weighted: right,
      f1_macro: right,
      f1_generated: ({ shown }) => Number(shown.pred_generated === shown.gold),
      gold_margin: ({ shown }) => margin(shown),
      agreement: ({ shown, before }) => Number(shown.pred === before.pred),
    }[name];
    return [{ kind: slice, count, noMean: name.startsWith("f1_") }];
  }
  if (name === "fluency" || name === "consistency") return [{ kind: "generation" }];
  if (name === "relation_specificity") {
    return [{ kind: name, count: ({ shown }) => shown.tokens_agreeing / shown.tokens }];
  }
  if (!name.endsWith("_acc") && !name.startsWith("portability_")) return [{ kind: null }];
  const count = {
    "": ({ shown }) => shown.tokens_right / shown.tokens,
    _any: ({ shown }) => shown.tokens_right_any / shown.tokens_any,
    _exact: ({ shown }) => Number(shown.tokens_right === shown.tokens),
  }[view];
  return [{ kind: name.replace(/_acc$/, ""), count }];
}

// The rows of one weight set that a part of a metric has on a slice.
function rowsOf(data, weights, wanted, slice) {
  const rows = [];
  for (const part of data.parts) {
    const { kind, edits_applied } = part;
    if (part.weights !== weights || (wanted === null ? isTask(kind) : kind !== wanted)) continue;
    for (let i = 0; i < part.rows; i += 1) {
      const row = { weights, kind, edits_applied };
      for (const [name, column] of Object.entries(part.fields)) row[name] = data.columns[column][i];
      for (const name of TEXT_FIELDS) if (name in row) row[name] = data.texts[row[name]];
      if (!slice.startsWith("batch:") || slice === `batch:${row.batch}`) rows.push(row);
    }
  }
  return rows;
}

// The records behind a link, each with its prompts and its value, and the value made of them; null where the
// run has no such score. A routed prompt shows the unedited model's row where it was sent there.
function contributions(data, ask) {
  const [slice, metric] = [ask.get("slice"), ask.get("metric")];
  const record = data.records.find((each) => SETTING.every((name) => each[name] === ask.get(name)));
  if (!record?.scores[metric]) return null;
  const parts = partsOf(metric, slice);
  const groups = new Map();
  let n = 0;
  for (const [position, { kind, count }] of parts.entries()) {
    const key = (row) => JSON.stringify([row.kind, row.case_id, row.index]);
    const unedited = new Map(rowsOf(data, "unedited", kind, slice).map((row) => [key(row), row]));
    for (const row of rowsOf(data, record.weights, kind, slice)) {
      const before = unedited.get(key(row));
      const route = record.route === null ? undefined : (row.routes?.[record.route] ?? row.route);
      const prompt = { row, before, route, shown: route === "unedited" ? (before ?? {}) : row };
      if (before || slice === "probes") prompt.counts = count?.(prompt);
      const name = isTask(row.kind) ? key(row) : row.case_id;
      if (!groups.has(name)) groups.set(name, { first: row, prompts: [], counts: parts.map(() => []) });
      groups.get(name).prompts.push(prompt);
      groups.get(name).counts[position].push(prompt.counts);
      n += 1;
    }
  }
  const rewrites = rowsOf(data, record.weights, "rewrite", slice);
  const edits = new Map(rewrites.map(({ case_id, prompt }) => [case_id, prompt]));
  const joined = (rates) => (parts.length > 1 ? harmonic(rates) : rates[0]);
  const records = [...groups.values()];
  for (const group of records) {
    group.rates = group.counts.map(mean);
    group.value = joined(group.rates);
    group.title = edits.get(group.first.case_id) ?? group.first.prompt.slice(-200);
  }
  const rates = parts.map((_, i) => mean(records.filter((r) => r.counts[i].length).map((r) => r.rates[i])));
  const value = parts.some((part) => part.noMean) ? NaN : joined(rates);
  if (parts.length > 1 || parts[0].kind === "generation") n = records.length;
  return { record, metric, records, rates, value, n };
}

// The panel. What comes from a run is set as text, never as markup.

const section = document.currentScript.closest("section");
const dialog = section.querySelector("dialog");
const sum = dialog.querySelector(".sum");
const controls = [...dialog.querySelectorAll("input, select")];
const [search, only, order] = controls;
const PREFIX = "#cases?";
let unpacked = null; // promise of the data
let view = null; // what the panel shows

const known = (value) => value !== undefined && value !== null && !Number.isNaN(value);
const share = (part, whole) => (known(part) && known(whole) ? `${part} of ${whole}` : undefined);
const which = (ofNew, ofTrue) => (ofNew ? (ofTrue ? "both" : "new") : ofTrue ? "true" : "neither");

function written(value, digits = 2) {
  if (!known(value)) return "–";
  const unit = UNITS[view.metric];
  return unit === undefined ? `${(100 * value).toFixed(digits)} %` : value.toFixed(digits) + unit;
}

// Heading -> what a prompt has there; a column in which a record has nothing is left out.
const COLUMNS = {
  Kind: ({ row }) => row.kind,
  Prompt: ({ row }) => row.prompt,
  Text: ({ shown }) => shown.text,
  Counts: ({ counts }) => (known(counts) ? written(counts, 1) : undefined),
  "NLL new": ({ shown }) => shown.nll_new,
  "NLL true": ({ shown }) => shown.nll_true,
  Likelier: ({ shown: { nll_new, nll_true } }) =>
    known(nll_new) ? which(nll_new < nll_true, nll_true < nll_new) : undefined,
  Predicts: ({ shown }) => (known(shown.argmax_new) ? which(shown.argmax_new, shown.argmax_true) : undefined),
  "Tokens, new": ({ shown }) => share(shown.tokens_right_new, shown.tokens_new),
  "Tokens, true": ({ shown }) => share(shown.tokens_right_true, shown.tokens_true),
  "Tokens right": ({ shown }) => share(shown.tokens_right, shown.tokens),
  "Of any answer": ({ shown }) => share(shown.tokens_right_any, shown.tokens_any),
  "As unedited": ({ shown }) => share(shown.tokens_agreeing, shown.tokens),
  Gold: ({ shown }) => shown.gold,
  Predicted: ({ shown }) => shown.pred,
  "Unedited said": ({ before }) => before?.pred,
  Generated: ({ shown }) => shown.pred_generated,
  "Log-probabilities": ({ shown }) => shown.choice_logprobs?.join(", "),
  Route: ({ route }) => route,
  "Route score": ({ row }) => (view.record.has_route_score ? row.route_score : undefined),
  "Answered by": ({ shown }) => shown.weights,
};

function element(tag, text, className = "") {
  const node = Object.assign(document.createElement(tag), { className });
  if (known(text)) node.textContent = text;
  return node;
}

function promptsTable(prompts) {
  const columns = Object.entries(COLUMNS).map(([name, cell]) => [name, prompts.map(cell)]);
  const filled = columns.filter(([, cells]) => cells.some(known));
  const table = element("table");
  table.createTHead().insertRow().append(...filled.map(([name]) => element("th", name)));
  const body = table.createTBody();
  const tone = (name) => (name === "Prompt" || name === "Text" ? "free" : "");
  for (const i of prompts.keys()) {
    body.insertRow().append(...filled.map(([name, cells]) => element("td", cells[i] ?? "–", tone(name))));
  }
  const wide = element("div", undefined, "wide");
  wide.append(table);
  return wide;
}

function recordNode(group) {
  const { first, value, rates, prompts, title } = group;
  const facts = [`case ${first.case_id}`];
  if (known(first.batch)) facts.push(`batch ${first.batch}`);
  if (rates.length > 1) facts.push(rates.map((rate) => written(rate, 0)).join(" / "));
  const summary = element("summary");
  summary.append(element("b", written(value, 1)), ...facts.map((text) => element("span", text)));
  summary.append(element("small", title));
  const node = element("details");
  node.append(summary);
  node.addEventListener("toggle", () => node.append(promptsTable(prompts)), { once: true });
  return node;
}

function holds(group, text) {
  const words = group.prompts.flatMap(({ row, shown }) => [row.prompt, shown.text ?? ""]);
  words.push(`case ${group.first.case_id}`, group.title);
  return words.some((each) => each.toLowerCase().includes(text));
}

function list() {
  if (!view) return;
  const text = search.value.trim().toLowerCase();
  const succeeds = ({ value }) => (view.metric in UNITS ? value > 0 : value === 1);
  const wanted = (group) => !only.value || succeeds(group) === (only.value === "right");
  const kept = view.records.filter((group) => wanted(group) && holds(group, text));
  const sign = { lowest: 1, highest: -1 }[order.value];
  if (sign) kept.sort((one, other) => sign * (one.value - other.value));
  dialog.querySelector("output").textContent = `${kept.length} of ${view.records.length} records`;
  dialog.querySelector(".records").replaceChildren(...kept.map(recordNode));
}

function head() {
  const { record, metric, records, rates, value, n } = view;
  const [recorded, recordedN] = record.scores[metric];
  const tolerance = metric in UNITS ? 1e-3 : 1e-6; // beyond what shortened numbers are off
  const differs = known(value) && (n !== recordedN || Math.abs(value - recorded) > tolerance);
  const lines = [`In the run's records: ${written(recorded)}, n ${recordedN}.`];
  if (known(value)) lines.push(`Recomputed from the prompts below: ${written(value)}, n ${n}.`);
  else lines.push("It is not recomputed here.");
  const parts = Object.keys(KINDS).map((name, i) => `${name} ${written(rates[i])}`);
  if (rates.length > 1) lines.push(`Harmonic mean of ${parts.join(", ")}.`);
  if (metric.startsWith("route_")) lines.push("What is sent to the edited model counts.");
  if (differs) lines.push("The two differ.");
  sum.textContent = lines.join(" ");
  sum.classList.toggle("warning", differs);
  const by = records.length
    ? `Answered by ${record.weights}, edits applied: ${records[0].first.edits_applied}`
    : `The run's cases have no rows of ${record.weights} here`;
  dialog.querySelector(".by").textContent =
    by + (record.route === null ? "." : "; where the route says unedited, by the unedited model.");
}

async function unpack() {
  const packed = atob(section.querySelector("script[type^='application/octet-stream']").textContent);
  const bytes = Uint8Array.from(packed, (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

const isTwin = ({ dataset }) => dataset.run === section.dataset.run;
const twins = () => [...document.querySelectorAll("section.cases")].filter(isTwin);

// What the address asks of this run, if anything. Of two runs with one id the first on the page answers.
function asked() {
  const hash = location.hash;
  const ask = new URLSearchParams(hash.startsWith(PREFIX) ? hash.slice(PREFIX.length) : "");
  return ask.get("run_id") === section.dataset.run && twins()[0] === section ? ask : null;
}

async function open() {
  const hash = location.hash;
  const ask = asked();
  if (!ask) return dialog.close();
  const [editor, cell, merger, ratio, router, k] = SETTING.filter((n) => n !== "slice").map((n) => ask.get(n));
  const setting = [merger, ratio && `r=${ratio}`, router, k && `k=${k}`];
  const names = [editor !== "none" && editor, cell, ...setting].filter(Boolean);
  dialog.querySelector("h2").textContent = `${names.join(" ")}, ${ask.get("slice")}: ${ask.get("metric")}`;
  const others = twins().length > 1 ? "; another run on this page has the same id" : "";
  dialog.querySelector(".from").textContent = `Run ${section.dataset.name}${others}`;
  for (const each of ["output", ".by", ".records"]) dialog.querySelector(each).replaceChildren();
  for (const control of controls) control.value = "";
  sum.className = "sum";
  sum.textContent = "Unpacking …";
  view = null;
  if (!dialog.open) dialog.showModal();
  try {
    unpacked ??= unpack();
    const data = await unpacked;
    if (location.hash !== hash) return; // another link was followed meanwhile
    view = contributions(data, ask);
    if (view) head();
    else sum.textContent = "The run has no such score.";
    list();
  } catch (error) {
    sum.textContent = `The cases cannot be shown: ${error.message}`;
  }
}

dialog.addEventListener("close", () => {
  // The same link must be able to open the panel again.
  if (asked()) history.replaceState(null, "", location.href.split("#")[0]);
});
for (const control of controls) control.addEventListener("input", list);
addEventListener("hashchange", open);
addEventListener("DOMContentLoaded", open);
