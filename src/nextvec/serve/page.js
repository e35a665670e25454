"use strict";
// One file, no library. Text arrives as server-sent events of POST /nextvec/patches, one for each patch (docs/serve.md).
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const COLOURS = 6;
const CUTS = ["top_p", "top_k", "frequency_penalty", "presence_penalty"]; // of laws of single tokens
const candidates = {pool: 200, centre: 8}; // of each sampler, while the other is chosen
const FIELDS = {max_tokens: "Tokens", top_p: "Top p", top_k: "Top k", frequency_penalty: "Frequency penalty",
  presence_penalty: "Presence penalty", temperature: "Temperature", candidates: "Candidates", method: "Sampler", seed: "Seed"};
let models = [], stopping = null, panes = [];

function make(name, attributes = {}, ...children) {
  const svg = ["svg", "rect", "circle", "path", "title"].includes(name);
  const node = svg ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function say(text) { $("status").textContent = text; }

function complain(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

function headers() {
  const found = {"content-type": "application/json"};
  if ($("key").value) found.authorization = "Bearer " + $("key").value;
  return found;
}

// Fields as this page calls them.
const labelled = (text) => text.replace(/\b[a-z]+(_[a-z]+)?\b/g, (word) => word.includes("_") && FIELDS[word] || word)
  .replace(/^[a-z]+(?=[: ])/, (word) => FIELDS[word] || word);

// An answer that is an error, as a sentence for the reader.
async function sentence(answer) {
  if (answer.status === 401) $("key-field").hidden = false;
  try {
    const {error} = await answer.json();
    const wait = answer.headers.get("retry-after");
    return labelled(error.message) + (wait ? ` (in ${wait} s)` : "");
  } catch { return `The server answered ${answer.status}.`; }
}

async function loadModels() {
  let answer;
  try { answer = await fetch("v1/models", {headers: headers()}); }
  catch { return complain("The server cannot be reached."); }
  if (!answer.ok) return complain(await sentence(answer));
  models = (await answer.json()).data;
  complain("");
  const option = (text, value) => make("option", {value}, text);
  $("model").replaceChildren(...models.map((each) => option(each.id, each.id)));
  $("beside").replaceChildren(option("nothing", ""), ...models.map((each) => option(each.id, each.id)));
  const calm = models.find((each) => each.nextvec.kind === "calm") || models[0];
  const token = models.find((each) => each.nextvec.kind === "token_lm" && each !== calm);
  $("model").value = calm.id;
  $("beside").value = token ? token.id : "";
  suit();
}

const chosenModels = () => [...new Set([$("model").value, $("beside").value].filter(Boolean))]
  .map((name) => models.find((each) => each.id === name));
const averages = (card) => $("method").value === "centre" && card.nextvec.latent !== null;
const tokenwise = (card) => ["auto", "token"].includes($("method").value) && card.nextvec.by_token;
const lawful = (card) => card.nextvec.kind === "token_lm" || tokenwise(card);
const pooled = (card) => card.nextvec.kind === "calm" && !averages(card) && !tokenwise(card);

// Only what the chosen models use can be set: a sampler where there is a choice, a temperature where there is no mean,
// candidates where there are any, cuts and penalties where tokens have laws.
function suit() {
  const cards = chosenModels();
  const can = {auto: true, pool: true, centre: cards.some((card) => card.nextvec.latent !== null),
    token: cards.some((card) => card.nextvec.kind === "calm" && card.nextvec.by_token)};
  for (const option of $("method").options) option.disabled = !can[option.value];
  if (!can[$("method").value]) choose("auto");
  $("method").disabled = !can.centre && !can.token;
  $("temperature").disabled = cards.every(averages);
  $("candidates").disabled = cards.every((card) => !averages(card) && !pooled(card));
  for (const name of CUTS) $(name).disabled = !cards.some(lawful);
  warn(cards.filter((card) => !lawful(card)));
}

// Top p, top k and penalties may have no effect: then the page says on which model, and what would give them one.
function warn(cards) {
  const lawless = cards.map((card) => card.id).join(" and ");
  const fix = cards.every((card) => card.nextvec.by_token) ? ": choose the sampler token by token" : "";
  $("note").textContent = lawless && `Top p, top k and penalties have no effect on ${lawless}, whose sampler here does not look at single tokens${fix}.`;
  $("note").hidden = !lawless;
}

// A pool and a mean each have their own number of candidates.
let counted = "pool"; // the model's own sampler, where it is a pool, has a pool's
function choose(method) {
  $("method").value = method;
  const now = method === "centre" ? "centre" : "pool";
  candidates[counted] = $("candidates").value;
  $("candidates").value = candidates[now];
  counted = now;
}

function request(card) {
  const told = {model: card.id, prompt: $("prompt").value.replaceAll("\r\n", "\n"), max_tokens: Number($("length").value),
    seed: Number($("seed").value)};
  if (averages(card)) return {...told, method: "centre", candidates: Number($("candidates").value)};
  told.temperature = Number($("temperature").value);
  if (lawful(card)) for (const name of CUTS) if ($(name).value) told[name] = Number($(name).value);
  if (tokenwise(card)) return $("method").value === "auto" ? told : {...told, method: "token"};
  const pool = counted === "pool" ? $("candidates").value : candidates.pool;
  return {...told, candidates: Number(pool)};
}

// The text of one model: a listbox whose options are patches, so that arrow keys walk through them.
class Pane {
  constructor(card) {
    this.card = card;
    this.asked = request(card);
    this.tokenwise = tokenwise(card);
    this.patches = [];
    this.tokens = 0; this.seconds = 0; this.first = null; this.began = performance.now();
    const kind = card.nextvec.kind === "calm" ? `CALM, ${card.nextvec.patch_size} tokens a step` : "token model, one token a step";
    this.list = make("div", {class: "text", role: "listbox", tabindex: "0", "aria-label": `Text of ${card.id}, by patches`,
      "aria-orientation": "horizontal"});
    if (this.asked.prompt) this.list.append(make("span", {class: "prompt", role: "presentation"}, this.asked.prompt));
    this.figures = {};
    const list = make("dl", {class: "figures"});
    for (const [key, words] of [["rate", "tokens/s"], ["steps", "steps/s"], ["first", "first text"], ["count", "tokens in steps"]]) {
      this.figures[key] = make("dd", {"data-figure": key}, "–");
      list.append(make("div", {}, make("dt", {}, words), this.figures[key]));
    }
    this.node = make("article", {class: card.nextvec.kind}, make("h3", {}, `${card.id} `,
      make("span", {class: "small"}, kind)), this.list, list);
    this.list.addEventListener("keydown", (event) => this.key(event));
    this.list.addEventListener("focus", () => { if (this.chosen === undefined && this.patches.length) this.choose(0); });
  }

  add(patch) {
    const index = this.patches.length;
    this.tokens += patch.tokens;
    this.seconds += patch.seconds;
    if (this.first === null && patch.text) this.first = performance.now() - this.began;
    const node = make("span", {role: "option", id: `${this.card.id}-${index}`, "aria-selected": "false",
      class: index % 2 ? "patch even" : "patch"});
    // a patch may be nothing but a line break, or nothing yet: then it still has a place
    patch.text.split("\n").forEach((line, number) => {
      if (number) node.append(make("span", {class: "break"}), "\n");
      node.append(line);
    });
    if (!patch.text) node.append("\u200b");
    node.addEventListener("click", () => this.choose(index));
    patch.node = node;
    this.patches.push(patch);
    this.list.append(node);
    if (this.chosen === undefined) this.list.scrollTop = this.list.scrollHeight;
    const steps = this.patches.length;
    this.figures.rate.textContent = (this.tokens / this.seconds).toFixed(0);
    this.figures.steps.textContent = (steps / this.seconds).toFixed(0);
    this.figures.first.textContent = this.first === null ? "–" : `${this.first.toFixed(0)} ms`;
    this.figures.count.textContent = `${this.tokens} in ${steps}`;
  }

  // The patch whose vote tells most: several candidates, one of them with many votes.
  telling() {
    const most = this.patches.map(({vote}) => {
      const top = vote ? Math.max(...vote.candidates.map((each) => each.votes)) : 0;
      return vote ? top * (vote.kept - top) : 0;
    });
    return most.indexOf(Math.max(...most));
  }

  key(event) {
    const last = this.patches.length - 1;
    const now = this.chosen === undefined ? -1 : this.chosen;
    const where = {ArrowRight: now + 1, ArrowDown: now + 1, ArrowLeft: now - 1, ArrowUp: now - 1, Home: 0, End: last}[event.key];
    if (where === undefined || last < 0) return;
    event.preventDefault();
    this.choose(Math.max(0, Math.min(last, where)));
  }

  choose(index) {
    for (const pane of panes) {
      if (pane.chosen !== undefined) pane.patches[pane.chosen].node.setAttribute("aria-selected", "false");
      if (pane !== this) { pane.chosen = undefined; pane.list.removeAttribute("aria-activedescendant"); }
    }
    this.chosen = index;
    const patch = this.patches[index];
    patch.node.setAttribute("aria-selected", "true");
    const top = patch.node.offsetTop, bottom = top + patch.node.offsetHeight;
    this.list.scrollTop = Math.max(bottom - this.list.clientHeight, Math.min(this.list.scrollTop, top));
    this.list.setAttribute("aria-activedescendant", patch.node.id);
    explain(this, patch, index);
  }
}

// Line breaks spelled, and spaces at an end shown: two patches may differ by nothing else.
const quoted = (text) => JSON.stringify(text).slice(1, -1).replaceAll('\\"', '"').replaceAll("\\\\", "\\")
  .replace(/^ +| +$/g, (spaces) => "\u2423".repeat(spaces.length)) || "(nothing)";
const percent = (share) => share >= 0.0995 ? `${(100 * share).toFixed(0)} %` : `${(100 * share).toFixed(1)} %`;
const colour = (index) => index >= 0 && index < COLOURS ? `var(--c${index})` : "var(--other)";

// Six colours and three shapes; the shape says as much as the colour to a reader who does not see it.
function mark(index, x, y, size) {
  const fill = index >= COLOURS || index < 0 ? "none" : colour(index);
  const look = {fill, stroke: colour(index), "stroke-width": 1.2, opacity: index === -2 ? 0.35 : 0.9};
  if (index < 0 || index % 3 === 0) return make("circle", {cx: x, cy: y, r: size, ...look});
  if (index % 3 === 1) return make("rect", {x: x - size, y: y - size, width: 2 * size, height: 2 * size, ...look});
  return make("path", {d: `M${x} ${y - size * 1.2}L${x + size * 1.2} ${y + size}L${x - size * 1.2} ${y + size}Z`, ...look});
}

function explain({card, asked, tokenwise}, patch, index) {
  const mean = asked.method === "centre";
  $("detail").hidden = false;
  $("detail-title").textContent = `Patch ${index + 1} of ${card.id}: ${quoted(patch.text)}`;
  $("vote").replaceChildren();
  $("pictures").replaceChildren();
  const vote = patch.vote;
  if (!vote) {
    $("detail-words").textContent = card.nextvec.kind === "token_lm"
      ? "A token model knows the probability of every token: it needs no candidates and no vote, and has no latent."
      : "This patch came without its vote.";
    return;
  }
  if (mean) {
    const kinds = vote.candidates.filter((each) => each.votes).length + vote.others.candidates;
    $("detail-words").textContent = `The mean of ${vote.draws} latents, decoded once: there is no vote. One by one they are `
      + `${kinds} different ${kinds === 1 ? "patch" : "patches"}. The more latents, the likelier the text.`;
    $("vote").append(voteTable(vote, mean));
  } else if (vote.draws === 1) {
    $("detail-words").textContent = tokenwise
      ? `Each token was drawn by its own law at this temperature, given those before it: one ${patch.latent ? "latent" : "patch"}, no vote.`
      : "At temperature 1 a patch is the model's first draw: there is no vote.";
  } else {
    const kinds = vote.candidates.length + vote.others.candidates;
    const kept = vote.kept < vote.draws ? `, ${vote.kept} of them fit the end of the prompt` : "";
    $("detail-words").textContent = `${vote.draws} draws${kept}: ${kinds} different ${kinds === 1 ? "patch" : "patches"}. `
      + "The lower the temperature, the more a patch needs draws that agree on it.";
    $("vote").append(voteTable(vote, mean));
  }
  if (patch.latent) $("pictures").append(strip(patch.latent, mean));
  if (patch.points.length > 1) $("pictures").append(plot(patch, vote));
}

function voteTable(vote, mean) {
  const cells = (each, word) => [make("td", {}, String(each.votes)), ...(mean ? [] : [make("td", {}, percent(each.probability))]),
    make("td", {}, word)];
  const body = make("tbody");
  vote.candidates.forEach((each, index) => {
    const key = make("svg", {class: "mark", viewBox: "0 0 10 10", "aria-hidden": "true"}, mark(index, 5, 5, 3.4));
    body.append(make("tr", each.chosen ? {class: "chosen"} : {}, make("th", {scope: "row"}, key, quoted(each.text)),
      ...cells(each, each.chosen ? (mean ? "✓ the mean" : "✓ chosen") : "")));
  });
  const others = vote.others;
  if (others.candidates) {
    body.append(make("tr", {class: "others"}, make("th", {scope: "row"}, `${others.candidates} others`), ...cells(others, "")));
  }
  const head = (mean ? ["Patch", "Latents", ""] : ["Candidate", "Votes", "Chance", ""]).map((text) => make("th", {scope: "col"}, text));
  const words = mean ? "Latents that decode to the patch one by one." : "Votes: draws that decode to the patch. Chance: of being chosen at this temperature.";
  return make("table", {}, make("caption", {}, words), make("thead", {}, make("tr", {}, ...head)), body);
}

function strip(latent, mean) {
  const largest = Math.max(...latent.map(Math.abs), 1e-9);
  const svg = make("svg", {class: "strip", viewBox: `0 0 ${latent.length} 12`, preserveAspectRatio: "none", role: "img", height: "44",
    "aria-label": `${mean ? "Mean of the latents" : "Latent of the chosen draw"}: ${latent.length} numbers, the largest in size ${largest.toFixed(2)}`});
  latent.forEach((value, index) => {
    const cell = make("rect", {x: index, y: 0, width: 1.02, height: 12});
    cell.style.fill = `rgba(var(${value < 0 ? "--minus" : "--plus"}), ${Math.abs(value) / largest})`;
    cell.append(make("title", {}, `${index}: ${value}`));
    svg.append(cell);
  });
  svg.style.height = "2.75rem";
  return make("figure", {}, make("h3", {}, mean ? "The mean of the latents" : "The latent"), svg,
    make("figcaption", {}, `The ${latent.length} numbers that were decoded: orange below zero, blue above, strongest at ±${largest.toFixed(1)}.`));
}

function plot(patch, vote) {
  const size = 300, edge = 14;
  const reach = Math.max(...patch.points.flatMap(([x, y]) => [Math.abs(x), Math.abs(y)]), 1e-9);
  const place = (value) => size / 2 + value / reach * (size / 2 - edge);
  const svg = make("svg", {class: "plot", viewBox: `0 0 ${size} ${size}`, role: "img",
    "aria-label": `${patch.points.length} draws as points; draws of one candidate share its mark in the table`});
  const shown = patch.points.map(([x, y, index], number) => [index, place(x), size - place(y), number === patch.point]);
  shown.sort((a, b) => a[3] - b[3] || (b[0] < 0) - (a[0] < 0) || b[0] - a[0]);
  for (const [index, x, y, told] of shown) {
    const point = mark(index, x, y, 3.4);
    if (index >= 0) point.append(make("title", {}, quoted(vote.candidates[index].text)));
    svg.append(point);
    if (told) svg.append(make("circle", {cx: x, cy: y, r: 7.5, fill: "none", stroke: "var(--ink)", "stroke-width": 1.8}));
  }
  return make("figure", {}, make("h3", {}, "The draws"), svg, make("figcaption", {},
    `The draws' latents, projected to the plane that keeps most of their variance (${percent(patch.share)}). Marks as in the table; grey: other patches; ringed: the latent above.`));
}

// Events of a stream, as they come.
async function* eventsOf(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) if (part.startsWith("data: ") && part !== "data: [DONE]") yield JSON.parse(part.slice(6));
  }
}

async function write(pane, signal) {
  pane.began = performance.now();
  const answer = await fetch("nextvec/patches", {method: "POST", headers: headers(), body: JSON.stringify(pane.asked), signal});
  if (!answer.ok) throw new Error(await sentence(answer));
  let whole = false;
  for await (const event of eventsOf(answer)) {
    if (event.error) throw new Error(event.error.message);
    if (event.usage) whole = true;
    else pane.add(event);
  }
  if (!whole) throw new Error("The connection ended before the text did.");
}

// Scroll to what begins below the middle of the window: on a phone the form fills it.
function show(node) {
  if (node.getBoundingClientRect().top < innerHeight / 2) return;
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  node.scrollIntoView({block: "start", behavior: still ? "auto" : "smooth"});
}

async function run(event) {
  event.preventDefault();
  complain("");
  if (!models.length) await loadModels();
  if (!models.length) return;
  if (!$("seed").value) $("seed").value = 0; // as is asked for
  panes = chosenModels().map((card) => new Pane(card));
  $("texts").replaceChildren(...panes.map((pane) => pane.node));
  $("detail").hidden = true;
  show($("status"));
  stopping = new AbortController();
  $("write").disabled = true;
  $("stop").disabled = false;
  try {
    for (const pane of panes) { // one after the other: side by side each would slow the other
      say(`${pane.card.id} writes …`);
      await write(pane, stopping.signal);
    }
    say("Done. Choose a patch to see how it was chosen: click it, or walk through the text with the arrow keys.");
  } catch (error) {
    if (error.name === "AbortError") say("Stopped.");
    else { say(""); complain(error instanceof TypeError ? "The server cannot be reached." : error.message); }
  }
  $("write").disabled = false;
  $("stop").disabled = true;
  const first = panes.find((pane) => pane.patches.length);
  if (first && panes.every((pane) => pane.chosen === undefined)) first.choose(first.telling());
}

$("form").addEventListener("submit", run);
$("stop").addEventListener("click", () => stopping && stopping.abort());
$("temperature").addEventListener("input", () => { $("warmth").textContent = $("temperature").value; });
$("method").addEventListener("change", () => {
  choose($("method").value);
  suit();
});
for (const id of ["model", "beside"]) $(id).addEventListener("change", suit);
$("boundaries").addEventListener("change", () => $("texts").classList.toggle("bounded", $("boundaries").checked));
$("key").addEventListener("change", loadModels);
loadModels();
